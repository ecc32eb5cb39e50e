"""The comparison of decoding steps runs each way on every token, and patches whom it says."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.live_patch import LivePatch
from spider_sense.models import LoadedModel

BENCH = Path(__file__).parents[2] / "bench"


def test_every_way_computes_every_step(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    bench: Any = importlib.import_module("live_patch")
    seen: list[tuple[int, list[int]]] = []
    set_rows = LivePatch.set

    def note(self: LivePatch, total: int, rows: np.ndarray) -> None:
        if total:
            seen.append((total, rows.tolist()))
        set_rows(self, total, rows)

    monkeypatch.setattr(LivePatch, "set", note)
    done: list[None] = []
    line = bench.measure(tiny_loaded, 8, bench.ANSWER + 2, lambda: done.append(None))
    steps = bench.ANSWER + 2
    assert sorted(seen, key=str) == [(8, [0, 1])] * steps + [(8, [0, 7])] * steps + [(8, [])] * steps
    assert (len(done), line["patched"], line["steps"]) == (steps, 2, steps)
    assert set(line["ms"]) == {"bare", "off", "on", "on_apart", "bare_again"}
    for way in ("off", "on", "on_apart", "bare_again"):
        low, high = line[f"{way}_interval"]
        assert 0 < low <= line[f"{way}_ratio"] <= high


def test_a_step_leaves_the_context_as_it_was(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    bench: Any = importlib.import_module("live_patch")
    lengths: list[int] = []
    hook = tiny_loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            kwargs["past_key_values"].get_seq_length() if "past_key_values" in kwargs else -1
        ),
        with_kwargs=True,
    )
    bench.measure(tiny_loaded, 2, 2)
    hook.remove()
    # A prompt, then six passes of each of two steps: one of each way, and one that stays.
    assert lengths == [-1, *[bench.PROMPT] * 6, *[bench.PROMPT + 1] * 6]
