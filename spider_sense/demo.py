"""The demonstration: train a guard on a real model, check that its stream is exact, and let it stop misuse."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from spider_sense.case import Case
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.monitor import Monitor
from spider_sense.offline import whole_logits
from spider_sense.policy import Policy
from spider_sense.scoring import Bank, Scorer
from spider_sense.training.config import TrainConfig
from spider_sense.training.parts import choose_parts
from spider_sense.training.train import Trained, train

__all__ = ["Demonstration", "enforcement", "run_demo", "stream_difference"]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demo shows."""

    trained: Trained
    stream_max_abs_diff: float
    """Largest difference between streamed and whole-sequence scores, divided by max(1, |score|)."""
    zones_agree: bool
    rows: list[dict[str, Any]]
    """Each request of the mixed batch: prompt, label, action, tokens before the stop, text."""
    benign_unchanged: bool
    """Whether every request that was not stopped equals the unguarded run token for token."""

    def summary(self) -> dict[str, Any]:
        """Return the demo's last line."""
        manifest = self.trained.guard.manifest
        detector = manifest.detectors[0]
        overall = self.trained.results[detector.name]["overall"]
        stopped = [row for row in self.rows if row["stopped_after"] is not None]
        harmful = [row for row in self.rows if row["harmful"]]
        systems = ("guard", "tfidf", "length", "random_direction", "shuffled_labels")
        return {
            "model": manifest.fingerprint.base_model,
            "probe": f"{detector.family}/{detector.aggregator.kind}",
            "site": "+".join(detector.sites),
            "test": {name: overall[name] for name in systems},
            "at_thresholds": overall["at_thresholds"],
            "stream_max_abs_diff": self.stream_max_abs_diff,
            "zones_agree": self.zones_agree,
            "harmful": len(harmful),
            "stopped": sum(row["harmful"] for row in stopped),
            "benign": len(self.rows) - len(harmful),
            "benign_stopped": sum(not row["harmful"] for row in stopped),
            "stopped_after_tokens": sorted(row["stopped_after"] for row in stopped),
            "benign_unchanged": self.benign_unchanged,
        }


def run_demo(
    config: TrainConfig, loaded: LoadedModel, progress: Progress | None = None, each: int = 12
) -> Demonstration:
    """Train, then watch a mixed batch of test prompts.

    Args:
        config: the training run.
        loaded: the model.
        progress: gets bars.
        each: harmful and everyday prompts in the mixed batch.
    """
    trained = train(config, progress, loaded)
    test = [example for rows in choose_parts(config).test.values() for example in rows]
    harmful = [example for example in test if example.label == "harmful"][:each]
    benign = [example for example in test if example.label == "benign" and example.source == "corpus_everyday"][:each]
    difference, agree = stream_difference(trained.guard, loaded, [*harmful[: each // 2], *benign[: each // 2]])
    rows, unchanged = enforcement(trained.guard, loaded, [*harmful, *benign])
    return Demonstration(trained, difference, agree, rows, unchanged)


def stream_difference(
    guard: Guard, loaded: LoadedModel, examples: list[Example], new_tokens: int = 24
) -> tuple[float, bool]:
    """Compare the scores of a left-padded, KV-cached, batched generation with whole-sequence forward passes.

    Returns:
        The largest difference over all readouts from the end of the prompt on, divided by max(1, |score|), and whether
        all zones agree.
    """
    ids_BP, mask_BP = _left_padded(loaded, examples)
    with Monitor(guard, Policy.shadow(), keep_history=True).attach(loaded.model, loaded.tokenizer) as monitor:
        output = _generate(loaded, ids_BP, mask_BP, new_tokens)
    largest, agree = 0.0, True
    for row, case in enumerate(monitor.cases):
        start = int((~mask_BP[row].bool()).sum())
        ids = output[row, start : start + case.request.position]
        peak, readouts = _whole(guard, loaded, ids, case)
        streamed = np.array([value for _, value in case.history])
        whole = readouts[[position for position, _ in case.history]]
        scale = np.maximum(1.0, np.abs(whole))
        # Not Python's max, which would pass over NaN.
        largest = float(np.maximum(largest, (np.abs(streamed - whole) / scale).max()))
        agree &= bool(((case.peak[0] < case.thresholds[:, 0]) == (peak < case.thresholds[:, 0])).all())
    return largest, agree


def _whole(guard: Guard, loaded: LoadedModel, ids: Tensor, case: Case) -> tuple[float, np.ndarray]:
    """Score a finished conversation in one forward pass: its peak and the readout after each token, first detector."""
    bank = Bank(guard.probes, loaded.model.device, dtype=loaded.model.dtype)
    logits_TC = whole_logits(bank, loaded, ids.tolist())
    scorer = Scorer(bank)
    request = scorer.open("whole", case.request.prompt_length, case.request.skip, case.request.tail)
    peak_H, trace_TH = scorer.score_sequence(logits_TC, request)
    return float(peak_H[0]), trace_TH[:, 0].cpu().numpy()


def enforcement(
    guard: Guard, loaded: LoadedModel, examples: list[Example], new_tokens: int = 32
) -> tuple[list[dict[str, Any]], bool]:
    """Generate a mixed batch bare and guarded.

    Returns:
        A record per request, and whether all that were not stopped are unchanged.
    """
    ids_BP, mask_BP = _left_padded(loaded, examples)
    bare = _generate(loaded, ids_BP, mask_BP, new_tokens)
    with Monitor(guard).attach(loaded.model, loaded.tokenizer) as monitor:
        guarded = _generate(loaded, ids_BP, mask_BP, new_tokens)
    width, rows, unchanged = ids_BP.shape[1], [], True
    for row, (example, case) in enumerate(zip(examples, monitor.cases, strict=True)):
        # A breach at the very last token comes too late to stop anything.
        stopped = case.stopped_after is not None and case.stopped_after < guarded.shape[1] - width
        if not stopped:
            unchanged &= _same(bare[row], guarded[row], loaded.tokenizer.pad_token_id)
        rows.append(
            {
                "prompt": example.text,
                "harmful": example.label == "harmful",
                "action": case.decision.action,
                "score": float(case.peak[0]),
                "stopped_after": case.stopped_after if stopped else None,
                "text": loaded.tokenizer.decode(guarded[row, width:], skip_special_tokens=True),
            }
        )
    return rows, unchanged


def _same(one: Tensor, other: Tensor, pad: int) -> bool:
    """Whether two rows are equal but for padding at the end of the longer one."""
    shared = min(len(one), len(other))
    rest = torch.cat((one[shared:], other[shared:]))
    return torch.equal(one[:shared], other[:shared]) and bool((rest == pad).all())


def _left_padded(loaded: LoadedModel, examples: list[Example]) -> tuple[Tensor, Tensor]:
    chat, device = Chat(loaded.tokenizer), loaded.model.device
    prompts = [chat.render(example.turns or example.text).ids for example in examples]
    width = max(map(len, prompts))
    ids = [[loaded.tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _generate(loaded: LoadedModel, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    model: Any = loaded.model
    pad = loaded.tokenizer.pad_token_id
    output: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
    )
    return output
