"""A real model in a folder, guards for it, and engines of vLLM in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spider_sense.bench import random_guard
from spider_sense.calibration import calibrate
from spider_sense.chat import Chat, unscored
from spider_sense.corpus import load_corpus
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel, load_model
from spider_sense.offline import score_examples, whole_logits
from spider_sense.scoring import Aggregator, Bank, Probe, Scorer, SiteMap
from spider_sense.types import Site

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
INTERPRETER = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).with_name("triton_interpreter"))}
"""vLLM takes its second runner, the default on GPUs, only where Triton has a backend: here its interpreter."""
FIRST_RUNNER = "vllm.v1.worker.cpu_model_runner"
SITES = tuple(Site(layer, "resid") for layer in (0, 4, 8, 12, 16, 20, 24, 28))
MISUSE_SITE = Site(16, "resid")
Result = list[list[dict[str, Any]]]
Offline = Callable[[Path, Sequence[int], int], tuple[torch.Tensor, torch.Tensor]]
"""Takes a guard, tokens and the length of the prompt; returns peak [H] and trace [T, H] as transformers finds them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs vLLM where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        reason = pytest.mark.skip(reason="needs vLLM in an environment of its own: run `make test-vllm`")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(reason)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """SmolLM2 in float32, as transformers runs it."""
    return load_model("smollm2", "float32")


@pytest.fixture(scope="session")
def guard(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard with 64 heads of mixed kinds at 8 sites that finds everything clear."""
    folder = tmp_path_factory.mktemp("guard")
    random_guard(loaded, 64, SITES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(loaded: LoadedModel) -> Guard:
    """A guard that learned misuse from a sixteenth of the shipped corpus: Fisher's discriminant, thresholds and all."""
    rows = [row for place, row in enumerate(load_corpus()) if row.source != "corpus_special" and place // 2 % 16 == 0]
    harmful_N = torch.tensor([row.label == "harmful" for row in rows])
    mean_ND = torch.stack([_mean_hidden(loaded, row.text) for row in rows])
    centre_2D = torch.stack([mean_ND[harmful_N == side].mean(0) for side in (False, True)])
    rest_ND = mean_ND - centre_2D[harmful_N.long()]
    spread_DD = rest_ND.T @ rest_ND / len(rows)
    ridge = spread_DD.diagonal().mean() * torch.eye(len(spread_DD))
    direction_D = torch.linalg.solve(spread_DD + ridge, centre_2D[1] - centre_2D[0])
    maps = {MISUSE_SITE: SiteMap(direction_D[:, None], -(centre_2D.mean(0) @ direction_D)[None])}
    probe = Probe("misuse", "fisher", Aggregator(kind="mean"), maps)
    benign = [row for row in rows if row.label == "benign"]
    scores = score_examples(loaded, [probe], benign)
    thresholds = calibrate(scores.peak_NH[:, 0], scores.tokens, [row.id for row in benign], 0.1, 0.05)
    base = random_guard(loaded, 1, (MISUSE_SITE,)).manifest
    told = {"name": "misuse", "family": "fisher", "aggregator": probe.aggregator, "calibration": thresholds}
    detector = base.detectors[0].model_copy(update=told)
    return Guard(base.model_copy(update={"detectors": (detector,), "canaries": None}), (probe,))


def _mean_hidden(loaded: LoadedModel, text: str) -> torch.Tensor:
    """Return the mean [D] of the normalised hidden states of what a prompt adds to the template's head."""
    prompt = Chat(loaded.tokenizer).render(text)
    model: Any = loaded.model
    with torch.no_grad():
        found = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    hidden_TD: torch.Tensor = found[MISUSE_SITE.layer + 1][0, prompt.skip :]
    return (hidden_TD / hidden_TD.pow(2).mean(1, keepdim=True).sqrt()).mean(0)


@pytest.fixture
def one_head(guard: Path, guards: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float, float], Path]:
    """Return a function that makes a guard of one of those heads, with thresholds: detector, suspect, breach."""

    def make(name: str, suspect: float, breach: float) -> Path:
        whole = Guard.from_pretrained(guard)
        place = [detector.name for detector in whole.manifest.detectors].index(name)
        thresholds = guards.calibration(suspect, breach)
        detector = whole.manifest.detectors[place].model_copy(update={"calibration": thresholds})
        folder = tmp_path_factory.mktemp("one_head")
        manifest = whole.manifest.model_copy(update={"detectors": (detector,), "canaries": None})
        Guard(manifest, (whole.probes[place],)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    """Twelve prompts from short to some 300 tokens, as the server renders them."""
    texts = [row.text for row in load_corpus() if row.source == "corpus_everyday"]
    chat = Chat(loaded.tokenizer)
    return [list(chat.render(" ".join(texts[place : place + 1 + place])).ids) for place in range(12)]


@pytest.fixture(scope="session")
def new_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes a cache folder for a vLLM that knows what classes of models can do.

    To find that out takes it a process and some ten seconds. The rest, compiled graphs above all, is not shared.
    """
    known = tmp_path_factory.mktemp("modelinfos")

    def make() -> Path:
        folder = tmp_path_factory.mktemp("cache")
        (folder / "modelinfos").symlink_to(known)
        return folder

    return make


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory, new_cache: Callable[[], Path]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a script of this folder in a new process: its name, its job, the environment."""

    def run(script: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("job")
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), "job.json", "result.json"],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(new_cache()), **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-12000:])
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result

    return run


@pytest.fixture(scope="session")
def options(loaded: LoadedModel) -> dict[str, Any]:
    """What every engine is made with."""
    return {
        "model": loaded.model.name_or_path,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "seed": 0,
    }


@pytest.fixture(scope="session")
def run_engine(options: dict[str, Any], run_job: Callable[..., dict[str, Any]]) -> Callable[..., Result]:
    """Return a function that runs rounds of prompts through an engine in a new process."""

    def run(
        rounds: Sequence[Sequence[Sequence[int] | int]],
        settings: dict[str, Any] | None,
        sampling: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        environment: dict[str, str] | None = None,
        second_runner: bool = False,
        dummy_batches: bool = False,
        preempts: bool = False,
        adapter: Path | None = None,
        **engine: Any,
    ) -> Result:
        guarded = {} if settings is None else {"additional_config": {"spider_sense": settings}}
        asked = [sampling or {}] * len(rounds) if sampling is None or isinstance(sampling, dict) else sampling
        job = {
            "engine": {**options, **engine, **guarded},
            "sampling": [{"temperature": 0.0, "max_tokens": 12, **one} for one in asked],
            "dummy_batches": dummy_batches,
            "adapter": adapter and str(adapter),
            "rounds": rounds,
        }
        interpreted = INTERPRETER if second_runner else {}
        result = run_job("engine_job.py", job, {**interpreted, **(environment or {})})
        assert result["runner"] == ("vllm.v1.worker.cpu.model_runner" if second_runner else FIRST_RUNNER)
        assert result["looks_ahead"] == engine.get("async_scheduling", False)
        # Of an engine in a process of its own it is not counted.
        assert bool(result["preempted"]) == preempts
        done_rounds: Result = result["rounds"]
        return done_rounds

    return run


@pytest.fixture(scope="session")
def refusals(options: dict[str, Any], run_job: Callable[..., dict[str, Any]]) -> Callable[..., list[str]]:
    """Return a function that says why engines do not start, each made with its settings and more options."""

    def run(*engines: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
        made = [{**options, **more, "additional_config": {"spider_sense": settings}} for settings, more in engines]
        told: list[str] = run_job("engine_job.py", {"refused": made}, {})["refused"]
        return told

    return run


@pytest.fixture(scope="session")
def bare(prompts: list[list[int]], run_engine: Callable[..., Result]) -> list[dict[str, Any]]:
    """Answers of 24 tokens to all prompts by an engine without a guard, first runner, eager."""
    (found,) = run_engine([prompts], None, {"max_tokens": 24, "ignore_eos": True})
    return found


@pytest.fixture(scope="session")
def even(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny random model whose heads two ranks can share, with the tokenizer of the other."""
    folder = tmp_path_factory.mktemp("even")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on a CPU takes no less
        vocab_size=len(loaded.tokenizer),
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=loaded.tokenizer.bos_token_id,
        eos_token_id=loaded.tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return load_model(str(folder), "float32")


@pytest.fixture(scope="session")
def offline(loaded: LoadedModel, offline_of: Callable[[LoadedModel], Offline]) -> Offline:
    """Return a function that scores the first tokens of a conversation with SmolLM2."""
    return offline_of(loaded)


@pytest.fixture(scope="session")
def offline_of() -> Callable[[LoadedModel], Offline]:
    """Return a function that makes such a function for any model."""
    return _offline


def _offline(loaded: LoadedModel) -> Offline:
    known: dict[Path, tuple[Guard, Bank]] = {}

    def score(folder: Path, ids: Sequence[int], prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if folder not in known:
            guard = Guard.from_pretrained(folder)
            known[folder] = guard, Bank(guard.probes)
        guard, bank = known[folder]
        template, scorer = guard.manifest.template, Scorer(bank)
        request = scorer.open("offline", prompt_length, unscored(template.head, ids[:prompt_length]), template.tail)
        return scorer.score_sequence(whole_logits(bank, loaded, ids), request)

    return score
