"""From what an engine saw to what the detector is told."""

import numpy as np
import pytest

from spider_sense.chat import Chat
from spider_sense.extraction import Key
from spider_sense.extraction.observation import Asked, Observation, Reader
from spider_sense.extraction.turns import Turns
from spider_sense.models import LoadedModel

KEY = Key(b"sixteen bytes at least")
ASKED = Asked(parameters={"temperature": 0.5}, biased=(3, 9), top_logprobs=4, max_tokens=7, choices=3)
READING = np.arange(67, dtype=np.float32)


@pytest.fixture
def reader(tiny_loaded: LoadedModel) -> Reader:
    return Reader(KEY, Turns(tiny_loaded.tokenizer), {"shop": "app"})


def observe(chat: Chat, text: str, principal: str = "shop", reading: np.ndarray | None = READING) -> Observation:
    told = None if reading is None else lambda: reading
    return Observation(principal=principal, prompt=chat.render(text).ids, asked=ASKED, reading=told, time=5.0)


def test_an_event_has_numbers_and_keyed_hashes(reader: Reader, tiny_loaded: LoadedModel) -> None:
    chat = Chat(tiny_loaded.tokenizer)
    event = reader(observe(chat, "w20 w21"), "party")
    assert (event.principal, event.time, event.tenant) == ("shop", 5.0, "app")
    assert event.sketch is not None
    assert event.probes is not None
    assert (event.sketch.tolist(), event.probes.tolist()) == (list(range(64)), [64, 65, 66])
    assert event.opening == KEY.opening("w20 w21")
    assert event.parameters == KEY.parameters({"temperature": 0.5})
    assert event.links == (("declared", KEY.hash("declared", "party")),)
    assert (event.biased, event.top_logprobs, event.max_tokens, event.choices) == ((3, 9), 4, 7, 3)


@pytest.mark.parametrize("reading", [None, np.where(READING == 65, np.nan, READING), READING + np.inf])
def test_a_prompt_that_was_not_seen_whole_has_no_activations(
    reader: Reader, tiny_loaded: LoadedModel, reading: np.ndarray | None
) -> None:
    event = reader(observe(Chat(tiny_loaded.tokenizer), "w20", "nobody", reading), None)
    assert event.sketch is None
    assert event.probes is None
    assert (event.tenant, event.links) == ("", ())
