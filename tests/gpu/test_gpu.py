"""On an accelerator: the same tests of exactness, with the state on the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
