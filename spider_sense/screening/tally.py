"""What screening did and cost, over many conversations."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from spider_sense.screening.verdict import Screening

__all__ = ["tally"]


def tally(screenings: Iterable[Screening]) -> dict[str, Any]:
    """Count verdicts.

    Returns:
        ``conversations``, ``spans``; counts by ``stages``, ``outcomes`` and ``decided_by``; ``raised`` conversations;
        ``escalated`` (spans that went to the judge) and ``escalated_share``, None without a span; ``judge``: its
        failures, seconds, and tokens in and out; ``seconds`` of screening in all, without the model's pass.
    """
    all_of = list(screenings)
    verdicts = [verdict for screening in all_of for verdict in screening.verdicts]
    answers = [verdict.answer for verdict in verdicts if verdict.answer is not None]
    return {
        "conversations": len(all_of),
        "raised": sum(bool(screening.raised) for screening in all_of),
        "spans": len(verdicts),
        "stages": dict(Counter(verdict.stage for verdict in verdicts)),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts)),
        "decided_by": dict(Counter(verdict.decided_by for verdict in verdicts)),
        "escalated": len(answers),
        "escalated_share": len(answers) / len(verdicts) if verdicts else None,
        "judge": {
            "failures": sum(answer.outcome is None for answer in answers),
            "seconds": round(sum(answer.seconds for answer in answers), 6),
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
        },
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 6),
    }
