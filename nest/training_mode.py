"""What a model is while something is trained on it, and stops being afterwards: frozen, and sparing of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nest.full import Change

__all__ = ["checkpointing", "frozen"]


@contextmanager
def frozen(model: nn.Module, deltas: Change) -> Iterator[None]:
    """Let gradients reach nothing of the model but what is trained; no gradient outlives the block."""
    wanted = {id(parameter) for parameter in deltas.parameters()}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in trainable:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, before in trainable:
            parameter.requires_grad_(before).grad = None


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep no activations for the backward pass inside the block, if that is wanted; dropout is off either way."""
    model.eval()
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # which transformers asks for; the layers inside, such as dropout, stay as they are
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.eval()
