"""Writing models: a folder that transformers loads, and the digest of all its weights."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from spider_sense.errors import ConfigError
from spider_sense.folders import ArtifactKind
from spider_sense.models import LoadedModel

__all__ = ["save_model", "save_weights", "weights_digest", "writing"]


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Write a model, in the dtype that it has, and its tokenizer."""
    save_weights(loaded, folder)
    loaded.tokenizer.save_pretrained(folder)


def save_weights(loaded: LoadedModel, folder: Path) -> None:
    """Write a model without its tokenizer, and without a progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded.model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 over name, dtype, shape and every bit of each parameter and persistent buffer.

    Unlike the fingerprint's digest it reads all of them: about a second a gigabyte.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def writing(kind: ArtifactKind, folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``folder`` once the block is done.

    Raises:
        ConfigError: if it cannot be written.
        PatchError: if ``folder`` holds anything but an artifact of this kind.
    """
    try:
        with kind.staged(folder) as beside:
            yield beside
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write {folder}: {reason}; name a folder that can be made and has space") from error
