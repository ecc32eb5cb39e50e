"""What a detector may see of a text: the served model's activations, a static embedding, or words alone.

Shape letters: N texts, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import MissingExtraError
from spider_sense.extraction.bench.config import Embedding

__all__ = ["text_embedding"]

_WIDTH = 256


def text_embedding(name: Embedding, texts: Sequence[str], fit_on: Sequence[str]) -> NDArray[np.float32]:
    """Return vectors [N, D] of texts without the served model.

    Args:
        name: ``wordllama`` (256 numbers, weights in the package) or ``tfidf`` (words and pairs, SVD to 256 numbers).
        texts: N texts.
        fit_on: what TF-IDF and its SVD are fitted on: texts of the fit part.

    Raises:
        MissingExtraError: if the library is not installed.
    """
    return _wordllama(texts) if name == "wordllama" else _tfidf(texts, fit_on)


def _wordllama(texts: Sequence[str]) -> NDArray[np.float32]:
    try:
        import wordllama
    except ImportError as error:
        raise MissingExtraError("wordllama", "extraction-bench") from error
    # The package looks for its own tokenizer under another name than it ships it, and would download it.
    model: Any = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    return np.asarray(model.embed(list(texts), norm=True), dtype=np.float32)


def _tfidf(texts: Sequence[str], fit_on: Sequence[str]) -> NDArray[np.float32]:
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    counts = vectorizer.fit_transform(fit_on)
    reduced = TruncatedSVD(min(_WIDTH, counts.shape[1] - 1), random_state=0).fit(counts)
    return np.asarray(reduced.transform(vectorizer.transform(texts)), dtype=np.float32)
