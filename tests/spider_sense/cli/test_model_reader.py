"""Logs that are read with a model."""

from typing import Any

import numpy as np
import pytest

from spider_sense.chat import Chat, Rendered
from spider_sense.cli.model_reader import ModelReader
from spider_sense.errors import ConfigError, DataError
from spider_sense.extraction import Key
from spider_sense.extraction.encode import Encoder
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.rows import Row
from spider_sense.extraction.sketch import Sketch
from spider_sense.models import LoadedModel
from spider_sense.types import Site

WIDTH, SITE = 32, Site(1, "resid")
SHAPES: tuple[Any, ...] = (WIDTH, (WIDTH, SKETCH), (WIDTH, 1), 1)
MEAN, PROJECTION, WEIGHTS, BIASES = (np.ones(shape, dtype=np.float32) for shape in SHAPES)
SKETCHER = Sketch(MEAN, PROJECTION, WEIGHTS, BIASES, ("exam",))
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def _row(**fields: Any) -> Row:
    return Row.model_validate({"principal": "ann", "time": 1} | fields)


def _encode(reader: ModelReader, row: Row) -> Any:
    reader.check([row])
    (event,) = Encoder(Key(b"sixteen bytes at least"), SKETCHER, reader).encode([row])
    return event


@pytest.mark.parametrize("given", [{"hidden": [1.0] * WIDTH}, {"sketch": [1.0] * SKETCH, "probes": [0.0]}])
def test_rows_of_activations_need_no_chat_template(tiny_loaded: LoadedModel, given: dict[str, Any]) -> None:
    tiny_loaded.tokenizer.chat_template = None
    reader = ModelReader(tiny_loaded, SITE)
    assert _encode(reader, _row(**given)).sketch is not None
    with pytest.raises(ConfigError, match="no chat template"):
        _encode(reader, _row(text="w20"))


def test_a_conversation_that_the_template_does_not_take_is_told_with_its_principal(tiny_loaded: LoadedModel) -> None:
    tiny_loaded.tokenizer.chat_template = REFUSING + tiny_loaded.tokenizer.chat_template
    reader = ModelReader(tiny_loaded, SITE)
    assert _encode(reader, _row(text="w20")).sketch is not None
    messages = [{"role": "system", "content": "w40"}, {"role": "user", "content": "w20"}]
    with pytest.raises(DataError, match=r"'ann' has turns of system, user.*no system.*into the user's turn"):
        _encode(reader, _row(messages=messages))


def test_a_prompt_is_rendered_once(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, rendered, render = ModelReader(tiny_loaded, SITE), [], Chat.render
    row, other = _row(text="w20 w21"), _row(text="w22")

    def counted(chat: Chat, turns: Any, max_tokens: int | None = None) -> Rendered:
        rendered.append(turns)
        return render(chat, turns, max_tokens)

    monkeypatch.setattr(Chat, "render", counted)
    _encode(reader, row)
    _encode(reader, other)
    assert [turns for turns in rendered if isinstance(turns, str)] == ["w20 w21", "w22"]
