"""On an accelerator: the same tests of exactness, with the state on the device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense.models import LoadedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_steer_leaves_resting_rows_alone() -> None:
    from sense_kernels import steer

    hidden = torch.randn(17, 60).cuda()
    assert torch.equal(steer(hidden, torch.zeros(17).cuda(), torch.randn(60).cuda()), hidden)


def test_a_monitored_generation_on_the_device(tiny_model: Callable[[str], Any]) -> None:
    from spider_sense.capture import Capture
    from spider_sense.types import Site

    model = tiny_model("llama").cuda()
    ids = torch.arange(1, 9, device="cuda")[None]
    site = Site.parse("resid.1")
    with Capture(model, [site]) as capture, torch.inference_mode():
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        streamed = capture.take()[0].hidden[site]
        model(ids)
        whole = capture.take()[0].hidden[site]
    torch.testing.assert_close(streamed[:8], whole, rtol=1e-3, atol=1e-3)


def test_a_live_patch_on_the_device(tiny_loaded: LoadedModel) -> None:
    from spider_sense.attach import Attachment
    from spider_sense.bench import random_patch
    from spider_sense.live_patch import LivePatch
    from spider_sense.patching import apply_patch

    what = replace(tiny_loaded, model=tiny_loaded.model.cuda())
    model: Any = what.model
    patch, ids = random_patch(what, scale=3.0), torch.arange(1, 19, device="cuda").reshape(3, 6)
    live = LivePatch(what, patch)
    rows = [np.arange(6, 12), np.empty(0, np.int64), np.arange(6)]
    with torch.inference_mode():
        bare = model(ids).logits
        with Attachment(model, {}, lambda forward: live.set(18, rows[0]), live.rest, patchers=live.patchers()):
            second, _ = model(ids).logits, rows.pop(0)
            resting, _ = model(ids).logits, rows.pop(0)
            first = model(ids).logits
        apply_patch(what, patch)
        patched = model(ids).logits
    assert (patched - bare).abs().max() > 1e-3
    torch.testing.assert_close(second[1], patched[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first[0], patched[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(second[[0, 2]], bare[[0, 2]])
    assert torch.equal(first[1:], bare[1:])
    assert torch.equal(resting, bare)
