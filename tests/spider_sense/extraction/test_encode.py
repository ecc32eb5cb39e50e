"""From rows to events."""

from typing import Any

import numpy as np
import pytest

from spider_sense.errors import DataError
from spider_sense.extraction import Key
from spider_sense.extraction.encode import Encoder
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.rows import Row
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.turns import Parts

KEY, WIDTH = Key(b"sixteen bytes at least"), 70
RNG = np.random.default_rng(0)
SHAPES: tuple[Any, ...] = (WIDTH, (WIDTH, SKETCH), (WIDTH, 1), 1)
MEAN, PROJECTION, WEIGHTS, BIASES = (RNG.normal(size=shape).astype(np.float32) for shape in SHAPES)
SKETCHER = Sketch(MEAN, PROJECTION, WEIGHTS, BIASES, ("exam",))


class _Lengths:
    """Says the length of a prompt in every coordinate, and takes every prompt for a single turn."""

    def __call__(self, prompts: Any) -> np.ndarray:
        lengths = np.array([len(str(prompt)) for prompt in prompts], dtype=np.float32)
        return np.repeat(lengths[:, None], WIDTH, axis=1)

    def parts(self, prompt: Any) -> Parts:
        return Parts("", str(prompt))


def _row(**fields: Any) -> Row:
    return Row.model_validate({"principal": "a", "time": 1} | fields)


def test_each_row_gets_the_activations_that_it_came_with() -> None:
    hidden = 0.5 * RNG.normal(size=WIDTH).astype(np.float32)
    rows = [
        _row(text="One?"),
        _row(hidden=hidden.tolist()),
        _row(sketch=[0.5] * SKETCH, probes=[2.0]),
        _row(text="Three words? Or four?"),
    ]
    text, given, ready, longer = Encoder(KEY, SKETCHER, _Lengths()).encode(rows)
    assert text.sketch is not None
    np.testing.assert_allclose(text.sketch, SKETCHER.project(np.full((1, WIDTH), 4, dtype=np.float32))[0][0], rtol=1e-5)
    assert longer.sketch is not None
    assert not np.array_equal(longer.sketch, text.sketch)
    assert given.sketch is not None
    np.testing.assert_allclose(given.sketch, SKETCHER.project(hidden[None])[0][0], rtol=1e-4, atol=1e-4)
    assert given.opening == 0
    assert ready.sketch is not None
    assert ready.sketch.tolist() == [0.5] * SKETCH
    assert ready.probes is not None
    assert ready.probes.tolist() == [2.0]


def test_without_a_model_text_leaves_its_hashes_alone() -> None:
    (event,) = Encoder(KEY, SKETCHER).encode([_row(text="One two three")])
    assert event.sketch is None
    assert event.opening == KEY.opening("One two three")


def test_links_and_system_prompts_are_hashed_by_kind() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    (event,) = Encoder(KEY, SKETCHER).encode([_row(messages=messages, links={"payment": "card"})])
    assert event.links == (("payment", KEY.hash("payment", "card")), ("prefix", KEY.hash("prefix", "Be brief.")))


def test_another_width_is_refused() -> None:
    with pytest.raises(DataError, match="3 hidden numbers, expected 70"):
        Encoder(KEY, SKETCHER).encode([_row(hidden=[0.1, 0.2, 0.3])])
    assert Encoder(KEY, SKETCHER).encode([]) == []
