import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spider_sense.errors import MismatchError, SpiderSenseError
from spider_sense.models import LoadedModel
from spider_sense.offline import whole_logits
from spider_sense.reporting import reading
from spider_sense.reporting.assembly import prompt_examples
from spider_sense.reporting.reading import read_conversations
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.types import Site

PROMPTS = prompt_examples(["w7 w8 w9", "w20"])


@pytest.fixture
def loaded(tiny_loaded: LoadedModel) -> LoadedModel:
    """The tiny model, which does not stop by itself."""
    tiny_loaded.model.generation_config.eos_token_id = None
    return tiny_loaded


def test_tokens_carry_what_the_stream_saw(guards: Any, loaded: LoadedModel) -> None:
    guard = guards.guard(loaded, guards.many_probes())
    (item, _) = read_conversations(guard, loaded, PROMPTS, 6)
    assert item.difference <= 1e-5
    assert [track.detector for track in item.tracks] == ["attention", "ema", "mlp", "window", "tail"]
    for index, track in enumerate(item.tracks):
        assert [token.position for token in track.tokens] == list(range(item.skipped, item.skipped + len(track.tokens)))
        assert sum(token.response for token in track.tokens) == 6
        # The last token never passes through the model.
        assert track.tokens[-1].logit is None
        assert track.tokens[-1].readout is None
        readouts = [token.readout for token in track.tokens if token.readout is not None]
        assert max(readouts) == pytest.approx(track.peak, abs=1e-5), index
        first = next(token for token in track.tokens if token.readout is not None)
        if track.detector != "window":
            assert not first.response


def test_attention_shares_add_up_to_the_last_readout(guards: Any, loaded: LoadedModel) -> None:
    guard = guards.guard(loaded, guards.many_probes())
    track = read_conversations(guard, loaded, PROMPTS, 6)[0].tracks[0]
    shares = [token.contribution for token in track.tokens if token.contribution is not None]
    assert math.fsum(shares) == pytest.approx(track.tokens[-2].readout, abs=1e-5)


def test_only_tokens_of_the_span_contribute(guards: Any, loaded: LoadedModel) -> None:
    guard = guards.guard(loaded, guards.many_probes())
    item = read_conversations(guard, loaded, PROMPTS, 6)[0]
    tail = [token.response for token in item.tracks[4].tokens if token.contribution is not None]
    window = [token.response for token in item.tracks[3].tokens if token.contribution is not None]
    assert tail == [False] * guards.TAIL
    assert window == [True] * 5


def test_the_action_is_the_default_policys(guards: Any, loaded: LoadedModel) -> None:
    probes = [guards.probe("mean", "mean", "resid.1")]
    for suspect, breach, zone, action in ((1e6, 2e6, "clear", "observe"), (-1e6, 1e6, "suspect", "flag")):
        guard = guards.guard(loaded, probes, guards.calibration(suspect, breach))
        item = read_conversations(guard, loaded, PROMPTS, 2)[0]
        assert (item.tracks[0].zone, item.action) == (zone, action)
    stopped = read_conversations(guards.guard(loaded, probes, guards.calibration(-2e6, -1e6)), loaded, PROMPTS, 4)[0]
    assert stopped.action == "stop"
    # Shadow mode: the answer is written to its end.
    assert sum(token.response for token in stopped.tracks[0].tokens) == 4


def test_scores_that_are_no_number_are_a_breach_and_shown_as_none(guards: Any, loaded: LoadedModel) -> None:
    poisoned = SiteMap(torch.full((guards.WIDTH, 1), math.inf), torch.zeros(1))
    probe = Probe("bad", "made", Aggregator(kind="mean"), {Site.parse("resid.0"): poisoned})
    track = read_conversations(guards.guard(loaded, [probe]), loaded, PROMPTS, 2)[0].tracks[0]
    assert track.zone == "breach"
    assert all(token.readout is None for token in track.tokens)


def test_a_disagreement_is_an_error(guards: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = whole_logits
    monkeypatch.setattr(reading, "whole_logits", lambda *args: whole(*args) + 0.01)
    with pytest.raises(SpiderSenseError, match=r"differ by 0\.01"):
        read_conversations(guards.guard(loaded, [guards.probe("a", "mean", "resid.1")]), loaded, PROMPTS, 2)


def test_the_model_is_left_as_it_was(guards: Any, loaded: LoadedModel) -> None:
    read_conversations(guards.guard(loaded, guards.many_probes()), loaded, PROMPTS, 2)
    assert "generate" not in vars(loaded.model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_another_model_is_refused(guards: Any, loaded: LoadedModel, tiny_model: Any) -> None:
    guard = guards.guard(loaded, guards.many_probes())
    with pytest.raises(MismatchError):
        read_conversations(guard, replace(loaded, model=tiny_model("qwen2")), PROMPTS, 2)
