"""The same request makes the same event, whether a server sees it or a log tells of it."""

import copy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense.chat import Chat
from spider_sense.cli.model_reader import ModelReader
from spider_sense.extraction import Event, Key
from spider_sense.extraction.encode import Encoder
from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.observation import Asked, Observation, Reader
from spider_sense.extraction.profile import record
from spider_sense.extraction.rows import Row
from spider_sense.extraction.sketch import Sketch
from spider_sense.extraction.state import fresh
from spider_sense.extraction.turns import Turns
from spider_sense.extraction.watch import Watch
from spider_sense.guard import Template
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Extraction, Policy
from spider_sense.types import Site

KEY, SITE, WIDTH = Key(b"sixteen bytes at least"), Site(1, "resid"), 32
RNG = np.random.default_rng(0)
SHAPES: tuple[Any, ...] = (WIDTH, (WIDTH, SKETCH), (WIDTH, 2), 2)
MEAN, PROJECTION, WEIGHTS, BIASES = (RNG.normal(size=shape).astype(np.float32) for shape in SHAPES)
SKETCHER = Sketch(MEAN, PROJECTION, WEIGHTS, BIASES, ("any campaign", "exam"))
LONG = " ".join(f"w{number % 46}" for number in range(600))
CHATS: dict[str, list[tuple[str, str]]] = {
    "no system prompt": [("user", "w20 w21 w22 w23")],
    "a system prompt": [("system", " w40 w41\n"), ("user", "w20 w21 w22")],
    "an empty system prompt": [("system", ""), ("user", "w20 w21 w22")],
    "several turns": [("system", "w40"), ("user", "w20"), ("assistant", "w30"), ("user", "w21 w22 w23")],
    "control tokens that were typed": [("system", "w40 <|im_end|> w41"), ("user", "w20 <|im_start|> user w21")],
    "a long prompt": [("user", LONG)],
}
POLICY = Policy(rules=(), extraction=Extraction(watch="observe", limit="observe", act="observe"))


@pytest.fixture
def loaded(tiny_loaded: LoadedModel) -> LoadedModel:
    """A model with room for the long prompt."""
    config = copy.deepcopy(tiny_loaded.model.config)
    config.max_position_embeddings = 1024
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return replace(tiny_loaded, model=type(tiny_loaded.model)(config).eval())


@pytest.fixture
def lists() -> KnownLists:
    return KnownLists.build({"other": ["w1 w2 w3 w4"], "known": ["w20 w21 w22", "w20 w21 w22 w23"]})


def _served(
    guards: Any, what: LoadedModel, prompts: list[tuple[int, ...]], lists: KnownLists
) -> list[tuple[Event, Asked]]:
    """Return the events of prompts that a guarded model has read, and how it was asked."""
    _, recorder = guards.watch()
    guard, chat = guards.guard(what, guards.many_probes()), Chat(what.tokenizer)
    guard = replace(
        guard, manifest=guard.manifest.model_copy(update={"template": Template(head=chat.head, tail=chat.tail)})
    )
    reader = Reader(KEY, Turns(what.tokenizer), {"ann": "app"}, lists)
    with Monitor(guard, POLICY, extraction=Watch(recorder, SKETCHER.heads(SITE))).attach(what.model, what.tokenizer):
        for ids in prompts:
            options = {
                "max_new_tokens": 2,
                "do_sample": True,
                "temperature": 1.0,
                "top_p": 0.9,
                "sequence_bias": {(9,): 0.0},
            }
            what.model.generate(**guards.pad([list(ids)]), **options, principals=["ann"])
    return [(reader(seen, "ann"), seen.asked) for seen in recorder.seen]


def _row(seen: Event, asked: Asked, **said: Any) -> Row:
    # JSON of a client says 1 where the engine has 1.0.
    parameters = {
        name: 1 if isinstance(value, float) and value == 1 else value for name, value in asked.parameters.items()
    }
    row = {
        "principal": "ann",
        "time": seen.time,
        "tenant": "app",
        "links": {"declared": "ann"},
        "logit_bias": {"9": 0.0},
        "max_tokens": 2,
        "parameters": parameters,
    }
    return Row.model_validate(row | said)


def _same(one: Event, other: Event, *but: str) -> None:
    for field in fields(Event):
        if field.name in but:
            continue
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("sketch", "probes"):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert mine == theirs, field.name


def _counted(event: Event) -> bytes:
    """Return what a request adds to all counters but those of the activations."""
    states = fresh([5])
    record(states, EventBatch.of([replace(event, sketch=None, probes=None)]), salt=1)
    return states.tobytes()


def test_a_chat_is_the_same_event_in_a_server_and_in_a_log(guards: Any, loaded: LoadedModel, lists: KnownLists) -> None:
    chat, chats = Chat(loaded.tokenizer), list(CHATS.values())
    served = _served(guards, loaded, [chat.render(turns).ids for turns in chats], lists)
    rows = [
        _row(seen, asked, messages=[{"role": role, "content": content} for role, content in turns])
        for (seen, asked), turns in zip(served, chats, strict=True)
    ]
    logged = Encoder(KEY, SKETCHER, ModelReader(loaded, SITE), lists).encode(rows)
    for (seen, _), told in zip(served, logged, strict=True):
        _same(seen, told)
        assert _counted(seen) == _counted(told)
    kinds = [{kind for kind, _ in event.links} for event, _ in served]
    assert ["prefix" in found for found in kinds] == [False, True, False, True, True, False]
    assert [event.known_list for event, _ in served[:2]] == [1, 1]


@pytest.mark.parametrize("name", ["no system prompt", "a system prompt", "an empty system prompt", "several turns"])
def test_a_log_that_no_model_reads_has_the_same_hashes(tiny_loaded: LoadedModel, name: str, lists: KnownLists) -> None:
    turns, asked = (
        CHATS[name],
        Asked(parameters={"temperature": 0.5, "top_k": 3}, biased=(3, 9), max_tokens=7, choices=2),
    )
    observation = Observation(
        principal="ann", prompt=Chat(tiny_loaded.tokenizer).render(turns).ids, asked=asked, reading=None, time=5.0
    )
    seen = Reader(KEY, Turns(tiny_loaded.tokenizer), {}, lists)(observation, None)
    row = Row(
        principal="ann",
        time=5.0,
        messages=[{"role": role, "content": content} for role, content in turns],  # type: ignore[arg-type]
        parameters={"top_k": 3.0, "temperature": 0.5},
        logit_bias=(3, 9),
        max_tokens=7,
        n=2,
    )
    (told,) = Encoder(KEY, SKETCHER, lists=lists).encode([row])
    _same(seen, told, "sketch", "probes")


def test_a_raw_prompt_is_a_single_turn_in_both(guards: Any, tiny_loaded: LoadedModel, lists: KnownLists) -> None:
    """Its activations differ: a log's text is rendered as a chat."""
    text = "w20 w21 w22 w23"
    ids = tuple(tiny_loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    ((seen, asked),) = _served(guards, tiny_loaded, [ids], lists)
    for read in (None, ModelReader(tiny_loaded, SITE)):
        (told,) = Encoder(KEY, SKETCHER, read, lists).encode([_row(seen, asked, text=text)])
        _same(seen, told, "sketch", "probes")
        assert _counted(seen) == _counted(told)
    assert {kind for kind, _ in seen.links} == {"declared"}
