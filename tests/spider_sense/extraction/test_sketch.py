"""The sketch: what it whitens, and that a guard's heads compute it."""

from typing import Any

import numpy as np
import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.sketch import Sketch
from spider_sense.types import Site

WIDTH = 80


def _hidden(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Principals differ along the first coordinate, requests by a covariance that is far from round."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(40), rng.integers(20, 60, 40))
    centres = np.zeros((40, WIDTH))
    centres[:, 0] = rng.normal(0, 5, 40)
    scales = np.linspace(0.5, 3, WIDTH)
    hidden = centres[owners] + rng.normal(size=(len(owners), WIDTH)) * scales + 7
    return hidden.astype(np.float32), [f"p{owner}" for owner in owners]


def test_requests_of_one_principal_come_out_white_and_the_leading_coordinate_tells_them_apart() -> None:
    hidden, owners = _hidden()
    sketch, _ = Sketch.fit(hidden, owners, {}).project(hidden)
    names = np.array(owners)
    within = np.concatenate([sketch[names == name] - sketch[names == name].mean(axis=0) for name in np.unique(names)])
    covariance = np.cov(within.T)
    assert sketch.shape == (len(hidden), SKETCH)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.2
    assert 0.3 < np.diag(covariance).min() <= np.diag(covariance).max() < 1.5
    between = np.array([sketch[names == name].mean(axis=0) for name in np.unique(names)]).std(axis=0)
    assert between[0] > 4 * between[1:].max()


def test_a_fit_repeats_bit_by_bit() -> None:
    hidden, owners = _hidden()
    one, other = (Sketch.fit(hidden, owners, {"a": hidden[:50] + 1}) for _ in range(2))
    for name in ("mean", "projection", "weights", "biases"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("rows", "owners", "families", "says"),
    [
        (200, 199, 0, "199 principals for 200 requests"),
        (50, 50, 0, "cannot be fitted on 50 requests"),
        (200, 200, 8, "8 families"),
    ],
)
def test_bad_input_is_refused(rows: int, owners: int, families: int, says: str) -> None:
    hidden, names = _hidden()
    with pytest.raises(DataError, match=says):
        Sketch.fit(hidden[:rows], names[:owners], {str(index): hidden[:9] for index in range(families)})


def test_a_guards_heads_read_the_sketch(tiny_loaded: Any) -> None:
    from spider_sense.data import Example
    from spider_sense.offline import score_examples
    from spider_sense.pooling import pooled

    site, width = Site.parse("resid.1"), tiny_loaded.model.config.hidden_size
    rng = np.random.default_rng(0)
    shapes: tuple[Any, ...] = (width, (width, SKETCH), (width, 2), 2)
    mean, projection, weights, biases = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    sketch = Sketch(mean, projection, weights, biases, ("reasoning", "rubric"))
    texts = ["one", "two words", "a prompt that is somewhat longer than these"]
    means = pooled(tiny_loaded, site, texts)
    examples = [Example(id=t, text=t, label="", category="", source="", group="") for t in texts]
    live = score_examples(tiny_loaded, sketch.heads(site), examples).peak_NH
    np.testing.assert_allclose(live, np.concatenate(sketch.project(means), axis=1), atol=1e-4)


@pytest.mark.model
def test_heads_read_the_sketch_of_a_real_model() -> None:
    from spider_sense.data import Example
    from spider_sense.models import load_model
    from spider_sense.offline import score_examples
    from spider_sense.pooling import pooled

    loaded, site = load_model("smollm2", "float32"), Site.parse("resid.18")
    rng = np.random.default_rng(0)
    texts = [f"Question {i}: what is {i} plus {rng.integers(100)}? Explain it to a child." for i in range(16)]
    hidden = pooled(loaded, site, texts)
    noisy = np.concatenate([hidden + rng.normal(0, 0.1, hidden.shape).astype(np.float32) for _ in range(8)])
    sketch = Sketch.fit(noisy, [f"p{index % 8}" for index in range(len(noisy))], {"exam": hidden})
    examples = [Example(id=t, text=t, label="", category="", source="", group="") for t in texts]
    live = score_examples(loaded, sketch.heads(site), examples).peak_NH
    expected = np.concatenate(sketch.project(hidden), axis=1)
    np.testing.assert_allclose(live, expected, atol=1e-5 * np.abs(expected).max())
