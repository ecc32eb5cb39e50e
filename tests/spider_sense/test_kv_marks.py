"""KV that was made under a patch or a steer is refused to every later request."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from spider_sense.bench import random_patch
from spider_sense.errors import ConfigError
from spider_sense.kv_marks import check_unaltered, mark_altered
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.policy import Policy

PROMPTS = ([1, 5, 20, 21, 22], [1, 5, *range(30, 45)], [9, 50, 8])
WIDTH, NEW = 17, 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
FIRST = WIDTH + 1  # the verdict at the end of the prompt is read after one new token


@pytest.fixture
def flagging(guards: Any, tiny_loaded: LoadedModel) -> Any:
    """A guard that finds prompts of at most 3 tokens suspect: of PROMPTS, the last."""
    probe = guards.probe("short", "max", "resid.0")
    guard = guards.guard(tiny_loaded, [probe], guards.calibration(-1e6, 2e6, longer=(1e6, 2e6), bound=3))
    guard.vectors["calm@resid.0"] = torch.ones(32)
    return guard


def monitor(what: LoadedModel, guard: Any, action: str) -> Monitor:
    policy = Policy.model_validate(
        {
            "rules": ({"detector": "*", "zone": "suspect", "action": action},),
            "on_missing": "observe",
            "steer": {"vector": "calm", "strength": 5.0},
            "patch": {},
        }
    )
    return Monitor(guard, policy, patch=random_patch(what, scale=1.0)).attach(what.model, what.tokenizer)


def further(guards: Any, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the next turn: all tokens so far, and three more a row."""
    ids = torch.cat((output, torch.full((len(output), 3), 33)), 1)
    mask = torch.ones_like(ids)
    mask[:, :WIDTH] = guards.pad(PROMPTS)["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("action", ["patch", "steer", "observe"])
def test_a_cache_of_which_one_row_was_altered_is_refused(
    guards: Any, tiny_loaded: LoadedModel, flagging: Any, action: str, static: bool
) -> None:
    model: Any = tiny_loaded.model
    cache: Any = StaticCache(model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    with monitor(tiny_loaded, flagging, action) as watching:
        output = model.generate(**guards.pad(PROMPTS), **GREEDY, past_key_values=cache)
        turn = further(guards, output)
        held = WIDTH + NEW - 1
        if action == "observe":
            model.generate(**turn, **GREEDY, past_key_values=cache)
            assert [case.coverage.missing for case in watching.cases] == [held - WIDTH + len(p) for p in PROMPTS]
            return
        start = getattr(watching.cases[2], {"patch": "patched_from", "steer": "steered_from"}[action])
        assert start == len(PROMPTS[2]) + 1
        message = rf"holds {held} tokens a row, and those from {FIRST} on.*crop\(-{held - FIRST}\)"
        # The whole batch, its copy, and even a row that was not altered: rows carry no name.
        copied, selected = copy.deepcopy(cache), copy.deepcopy(cache)
        for other in (cache, copied):
            with pytest.raises(ConfigError, match=message):
                model.generate(**turn, **GREEDY, past_key_values=other)
        if not static:
            selected.batch_select_indices(torch.tensor([0]))
            with pytest.raises(ConfigError, match=message):
                model.generate(**{name: x[:1] for name, x in turn.items()}, **GREEDY, past_key_values=selected)
    # By another monitor, too, and nothing of the call stays behind.
    with monitor(tiny_loaded, flagging, "observe") as watching:
        free = len(watching._guarded._judge.scorer.stream._free)
        with pytest.raises(ConfigError, match=message):
            model.generate(**turn, **GREEDY, past_key_values=cache)
        assert len(watching._guarded._judge.scorer.stream._free) == free
        assert not watching._guarded.generate._busy.locked()


def test_a_cache_cropped_to_before_the_patch_is_as_good_as_new(
    guards: Any, tiny_loaded: LoadedModel, flagging: Any
) -> None:
    model: Any = tiny_loaded.model
    cache = DynamicCache(config=model.config)
    with monitor(tiny_loaded, flagging, "patch"):
        output = model.generate(**guards.pad(PROMPTS), **GREEDY, past_key_values=cache)
    turn = further(guards, output)
    cache.crop(-(WIDTH + NEW - 1 - FIRST))
    with monitor(tiny_loaded, flagging, "observe"):
        found = model.generate(**turn, **GREEDY, past_key_values=cache)
        # What was filled since is not altered either.
        check_unaltered(cache)
    assert torch.equal(found, model.generate(**turn, **GREEDY))


def test_a_mark_is_the_first_column_and_goes_with_what_it_marks() -> None:
    cache = DynamicCache()
    for column in (5, 3, 9):
        mark_altered(cache, column)
    layer = torch.zeros(1, 1, 4, 2)
    cache.update(layer, layer, 0)
    with pytest.raises(ConfigError, match=r"holds 4 tokens a row, and those from 3 on.*drop the last 1"):
        check_unaltered(cache)
    cache.reset()
    check_unaltered(cache)
    cache.update(layer, layer, 0)
    check_unaltered(cache)
    check_unaltered(None)
