"""A classifier of refusals, trained on labelled answers: TF-IDF of an opening's words and word pairs, and logistic
regression.

It is reported beside the phrase list and never merged with it: where the two disagree, one should read the answers.
A saved classifier is a folder with ``classifier.json`` and ``classifier.safetensors``.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from safetensors.torch import save_file

from nest.labelled_answers import LabelledAnswer
from nest.refusal import normalised
from nest.subsets import split_off
from spider_sense.baselines import TfidfBaseline
from spider_sense.errors import DataError
from spider_sense.folders import ArtifactKind, Record, VersionedRecord, sha256

__all__ = ["KIND", "HeldOut", "RefusalClassifier"]

WORDS = 20
"""Words of an opening that are read: about what 24 tokens hold."""
HELD_OUT = 0.25
MANIFEST, TENSORS = "classifier.json", "classifier.safetensors"
KIND = ArtifactKind(
    noun="refusal classifier", manifest=MANIFEST, version=1, maker="nest eval", again="train", error=DataError
)
_SPELT_OUT = (("can't", "can not"), ("cannot", "can not"), ("won't", "will not"), ("n't", " not"), ("'m", " am"))


class HeldOut(Record):
    """Accuracy on answers that were not trained on."""

    accuracy: float
    refusals: int
    """Held-out answers of each class."""
    compliances: int


class _Manifest(VersionedRecord):
    schema_version: int = KIND.version
    vocabulary: dict[str, int]
    intercept: float
    held_out: dict[str, HeldOut] = Field(default_factory=dict)
    tensors_digest: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RefusalClassifier:
    """A trained classifier."""

    tfidf: TfidfBaseline
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    """By source, and over all of them as ``all``."""

    @classmethod
    def fit(cls, answers: Sequence[LabelledAnswer], seed: int = 0) -> "RefusalClassifier":
        """Train on three quarters of each source's answers, test on the rest, and train again on all.

        Args:
            answers: of both classes.
            seed: which are held out.

        Raises:
            DataError: if a class is missing.
            MissingExtraError: if scikit-learn is not installed.
        """
        by_source: dict[str, list[LabelledAnswer]] = {}
        for answer in answers:
            by_source.setdefault(answer.source, []).append(answer)
        tests, train = {}, []
        for source, rows in by_source.items():
            count = max(1, round(HELD_OUT * len(rows)))
            tests[source], rest = split_off(rows, count, seed, lambda row: row.text)
            train += rest
        trial = cls(_trained(train))
        pooled = [answer for rows in tests.values() for answer in rows]
        held_out = {source: trial._accuracy(rows) for source, rows in {**tests, "all": pooled}.items()}
        return cls(_trained(answers), held_out)

    @property
    def digest(self) -> str:
        """Short digest of the trained weights, to tell classifiers apart."""
        weights = hashlib.sha256(json.dumps(self.tfidf.vocabulary, sort_keys=True).encode())
        for array in (self.tfidf.idf, self.tfidf.coefficients, np.array([self.tfidf.intercept])):
            weights.update(np.ascontiguousarray(array).tobytes())
        return weights.hexdigest()[:16]

    def predict(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Tell of N answers whether they refuse, ``[N]``.

        Raises:
            MissingExtraError: if scikit-learn is not installed.
        """
        if not texts:
            return np.zeros(0, dtype=np.bool_)
        return self.tfidf.scores([_features_of(text) for text in texts]) > 0

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the classifier, in the place of an older one."""
        tensors = {"idf": torch.from_numpy(self.tfidf.idf), "coefficients": torch.from_numpy(self.tfidf.coefficients)}
        with KIND.staged(Path(folder)) as beside:
            save_file(tensors, beside / TENSORS)
            manifest = _Manifest(
                vocabulary=self.tfidf.vocabulary,
                intercept=self.tfidf.intercept,
                held_out=dict(self.held_out),
                tensors_digest=sha256(beside / TENSORS),
            )
            (beside / MANIFEST).write_text(manifest.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RefusalClassifier":
        """Read a classifier.

        Raises:
            DataError: if a file is missing, damaged, or does not fit the other.
        """
        folder = Path(folder)
        manifest = KIND.read_manifest(folder, _Manifest)
        tensors = KIND.read_tensors(folder / TENSORS, manifest.tensors_digest)
        idf, coefficients = (tensors[name].double().numpy() for name in ("idf", "coefficients"))
        terms = len(manifest.vocabulary)
        columns = sorted(manifest.vocabulary.values())
        if not idf.shape == coefficients.shape == (terms,) or columns != list(range(terms)):
            shapes = f"idf {list(idf.shape)} and weights {list(coefficients.shape)}"
            raise DataError(f"{folder} has {terms} terms, {shapes}, which do not fit each other; train it again")
        tfidf = TfidfBaseline(
            vocabulary=manifest.vocabulary, idf=idf, coefficients=coefficients, intercept=manifest.intercept
        )
        return cls(tfidf, manifest.held_out)

    def _accuracy(self, answers: Sequence[LabelledAnswer]) -> HeldOut:
        truth = np.array([answer.refusal for answer in answers])
        right = self.predict([answer.text for answer in answers]) == truth
        return HeldOut(accuracy=float(right.mean()), refusals=int(truth.sum()), compliances=int((~truth).sum()))


def _trained(answers: Sequence[LabelledAnswer]) -> TfidfBaseline:
    texts = [_features_of(answer.text) for answer in answers]
    return TfidfBaseline.fit(texts, np.array([answer.refusal for answer in answers], dtype=np.bool_))


def _features_of(text: str) -> str:
    """Return the opening of an answer with contractions spelt out; ``i`` becomes a word that the vocabulary keeps."""
    opening = normalised(text)
    for short, long in _SPELT_OUT:
        opening = opening.replace(short, long)
    words = re.sub(r"\bi\b", "i_", opening).split()[:WORDS]
    return " ".join(["first_" + words[0], *words]) if words else ""
