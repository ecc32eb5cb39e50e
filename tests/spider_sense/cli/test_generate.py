"""What ``spider-sense generate`` says of a request, beside the text."""

from typing import Any

import pytest

from spider_sense.cli.generate import verdict_table
from spider_sense.judge import Judge
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy


@pytest.mark.parametrize(("start", "said"), [(None, ""), (0, "; patched from token 0 on")])
def test_the_table_says_from_where_on_a_request_was_patched(
    tiny_loaded: LoadedModel, guards: Any, start: int | None, said: str
) -> None:
    judge = Judge(guards.guard(tiny_loaded, guards.many_probes()[:1]), Policy.shadow())
    case = judge.open("a", [1, 5, 20])
    case.patched_from = start
    assert verdict_table(case).title == f"{case.decision.action}: {case.decision.reason}{said}"
    judge.close(case)
