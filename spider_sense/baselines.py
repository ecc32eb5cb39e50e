"""Controls that could explain a probe's result away: length, words, a lucky random direction, shuffled labels.

The text controls are trained on the guard's training texts and kept beside the guard, so that every later evaluation
reports them. A saved vocabulary holds single words and word pairs of the training texts, never a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from spider_sense.errors import ConfigError, DataError, GuardError, MissingExtraError
from spider_sense.metrics import auroc

__all__ = [
    "LengthBaseline",
    "TfidfBaseline",
    "best_random_direction",
    "load_baselines",
    "save_baselines",
    "shuffled_labels",
]

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]

MAX_FEATURES = 20_000
JSON_NAME, TENSORS_NAME = "baselines.json", "baselines.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBaseline:
    """Logistic regression on how long a text is: the log of its characters plus one, and its words."""

    log_chars: float
    words: float
    intercept: float

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Bools) -> "LengthBaseline":
        """Train on N texts and their labels ``[N]``, True for a positive.

        Raises:
            DataError: if the numbers differ or a class is missing.
            MissingExtraError: if scikit-learn is not installed.
        """
        _check_classes(len(texts), labels)
        lengths = _lengths(texts)
        mean, deviation = _standardisation(lengths)
        weights, bias = _logistic((lengths - mean) / deviation, labels)
        log_chars, words = (weights / deviation).tolist()
        intercept = bias - float(mean @ (weights / deviation))
        return cls(log_chars=log_chars, words=words, intercept=intercept)

    def scores(self, texts: Sequence[str]) -> Doubles:
        """Logits ``[N]`` of N texts."""
        logits: Doubles = _lengths(texts) @ np.array([self.log_chars, self.words]) + self.intercept
        return logits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TfidfBaseline:
    """Logistic regression on the TF-IDF of words and word pairs, with sublinear counts and unit length."""

    vocabulary: dict[str, int]
    """Term to column, at most 20000 terms, the most frequent ones."""
    idf: Doubles
    """``[terms]``."""
    coefficients: Doubles
    """``[terms]``."""
    intercept: float

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Bools) -> "TfidfBaseline":
        """Train on N texts and their labels ``[N]``, True for a positive.

        Raises:
            DataError: if the numbers differ, a class is missing, or no text has a word of two letters.
            MissingExtraError: if scikit-learn is not installed.
        """
        _check_classes(len(texts), labels)
        vectorizer = _vectorizer(max_features=MAX_FEATURES)
        try:
            features = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise DataError(
                f"no words in {len(texts)} training texts ({error}); check the field they come from"
            ) from error
        weights, bias = _logistic(features, labels)
        vocabulary = {term: int(column) for term, column in vectorizer.vocabulary_.items()}
        return cls(vocabulary=vocabulary, idf=vectorizer.idf_, coefficients=weights, intercept=bias)

    def scores(self, texts: Sequence[str]) -> Doubles:
        """Logits ``[N]`` of N texts.

        Raises:
            MissingExtraError: if scikit-learn is not installed.
        """
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        logits: Doubles = vectorizer.transform(texts) @ self.coefficients + self.intercept
        return logits


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    length: LengthBaseline
    vocabulary: dict[str, int]


def save_baselines(folder: Path, length: LengthBaseline, tfidf: TfidfBaseline) -> None:
    """Write ``baselines.json`` and ``baselines.safetensors`` into a folder that exists."""
    document = _Document(length=length, vocabulary=tfidf.vocabulary)
    tensors = {"idf": tfidf.idf, "coefficients": tfidf.coefficients, "intercept": np.array([tfidf.intercept])}
    (folder / JSON_NAME).write_text(document.model_dump_json(), encoding="utf-8")
    save_file(tensors, folder / TENSORS_NAME)


def load_baselines(folder: Path) -> tuple[LengthBaseline, TfidfBaseline]:
    """Read what ``save_baselines`` wrote.

    Raises:
        GuardError: if a file is missing, damaged, or does not fit the other.
    """
    try:
        document = _Document.model_validate_json((folder / JSON_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_NAME)
        idf, coefficients, intercept = tensors["idf"], tensors["coefficients"], float(tensors["intercept"].item())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise GuardError(f"cannot read the baselines in {folder}: {error!r}; train the guard again") from error
    terms = len(document.vocabulary)
    if sorted(document.vocabulary.values()) != list(range(terms)) or not idf.shape == coefficients.shape == (terms,):
        raise GuardError(
            f"the baselines in {folder} have {terms} terms, idf {idf.shape} and coefficients {coefficients.shape}; "
            "they must be equally many with columns from 0: train the guard again"
        )
    tfidf = TfidfBaseline(vocabulary=document.vocabulary, idf=idf, coefficients=coefficients, intercept=intercept)
    return document.length, tfidf


def best_random_direction(
    features_ND: Floats, labels: Bools, directions: int = 100, seed: int = 0
) -> tuple[Doubles, float]:
    """The random direction that happens to separate the labels best: what luck alone achieves.

    Directions are drawn from N(0, I) over the standardised features; the best one and its sign are chosen by AUROC. The
    first directions of a seed stay the same when more are drawn.

    Args:
        features_ND: ``[N, D]`` features to choose on.
        labels: ``[N]``.
        directions: how many to draw.
        seed: of the draw.

    Returns:
        Weight ``[D]`` and bias of the score ``features @ weight + bias``.

    Raises:
        ConfigError: if directions is not positive.
        DataError: if rows and labels differ in number or a class is missing.
    """
    if directions < 1:
        raise ConfigError(f"directions={directions}; draw at least 1, for example 100")
    _check_classes(len(features_ND), labels)
    mean, deviation = _standardisation(features_ND)
    candidates = np.random.default_rng(seed).standard_normal((directions, features_ND.shape[1]))
    projections = (features_ND - mean) / deviation @ candidates.T
    areas = np.array([auroc(column, labels) for column in projections.T], dtype=np.float64)
    best = int(np.argmax(np.abs(areas - 0.5)))
    weight = candidates[best] / deviation * (1.0 if areas[best] >= 0.5 else -1.0)
    return weight, -float(mean @ weight)


def shuffled_labels(labels: Bools, seed: int) -> Bools:
    """The labels ``[N]`` in random order: as many positives, none of the meaning."""
    return np.random.default_rng(seed).permutation(labels)


def _check_classes(rows: int, labels: Bools) -> None:
    positives = int(np.count_nonzero(labels))
    if labels.shape != (rows,):
        raise DataError(f"{rows} rows and labels of shape {labels.shape}; give one label a row")
    if positives in (0, rows):
        raise DataError(f"{positives} positives among {rows} rows; a baseline needs rows of both classes")


def _lengths(texts: Sequence[str]) -> Doubles:
    return np.array([(np.log1p(len(text)), len(text.split())) for text in texts], dtype=np.float64).reshape(-1, 2)


def _standardisation(features: Floats) -> tuple[Doubles, Doubles]:
    """Mean and standard deviation of each column, 1 where a column is constant."""
    deviation = features.std(axis=0, dtype=np.float64)
    return features.mean(axis=0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0)


def _vectorizer(**options: Any) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, **options)


def _logistic(features: Any, labels: Bools) -> tuple[Doubles, float]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    model = LogisticRegression(class_weight="balanced", max_iter=2000).fit(features, labels)
    return model.coef_[0], float(model.intercept_[0])
