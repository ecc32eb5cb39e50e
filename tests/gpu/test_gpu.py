"""On an accelerator: the same tests of exactness, with the state on the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_score_and_steer_match_the_cpu() -> None:
    from sense_kernels import score, steer

    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((17, 60), (60, 5), (5,)))
    none = torch.empty(0, 0), torch.empty(0)
    out = torch.full((20, 5), torch.nan), torch.full((20, 5), torch.nan, device="cuda")
    score(hidden, weight, bias, *none, 1e-6, out[0])
    score(hidden.cuda(), weight.cuda(), bias.cuda(), *(x.cuda() for x in none), 1e-6, out[1])
    torch.testing.assert_close(out[1].cpu(), out[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    strength, vector = torch.zeros(17), torch.randn(60, generator=generator)
    moved = steer(hidden.cuda(), strength.cuda(), vector.cuda())
    assert torch.equal(moved.cpu(), hidden)


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
