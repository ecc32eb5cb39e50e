"""Where a request comes from: what the guard wrote into its sampling parameters holds, what a client wrote does not."""

from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.serving.origin import CANARY, Choice, choice_of, is_canary, name_principal, numbered, principal_of


def test_what_a_client_writes_in_its_place_is_overwritten() -> None:
    sent = {"spider_sense_principal": "admin", "spider_sense_choice": [1, 2], **CANARY, "own": 1}
    params = SimpleNamespace(extra_args=sent)
    assert (choice_of(params), is_canary(params)) == ((1, 2), True), "which is why it has to be taken out"
    name_principal(params, "team-a")
    assert (principal_of(params), choice_of(params), is_canary(params)) == ("team-a", (0, 1), False)
    assert params.extra_args["own"] == 1
    name_principal(params, None)
    assert principal_of(params) is None
    assert params.extra_args == {"own": 1}
    assert sent["spider_sense_principal"] == "admin", "what others share is left as it is"


@pytest.mark.parametrize("extra", [None, {}, {"own": 1}, {"spider_sense_principal": ["a"]}])
def test_a_request_that_nobody_named_has_no_principal(extra: dict[str, object] | None) -> None:
    params = SimpleNamespace(extra_args=extra)
    assert (principal_of(params), principal_of(None)) == (None, None)
    assert (choice_of(params), choice_of(None), is_canary(params), is_canary(None)) == ((0, 1), (0, 1), False, False)


def test_each_choice_is_marked_in_parameters_of_its_own_and_keeps_its_mark() -> None:
    """Without a seed vLLM hands the same parameters to all choices."""
    shared = SimpleNamespace(extra_args={"own": 2, "spider_sense_choice": [9, 9]})
    told = [numbered(lambda index: (f"{index}_x", shared), SimpleNamespace(n=3), index) for index in range(3)]
    for index, (name, params) in enumerate(told):
        name_principal(params, "team-a")
        assert (name, choice_of(params), principal_of(params)) == (f"{index}_x", Choice(index, 3), "team-a")
        params.extra_args["spider_sense_choice"] = list(choice_of(params))
        assert choice_of(params) == (index, 3), "as it arrives in another process"
    assert shared.extra_args == {"own": 2, "spider_sense_choice": [9, 9]}


@pytest.mark.parametrize("told", [3, "12", [1], [1, 2, 3], ["1", 2], None, {"index": 1}])
def test_what_is_no_choice_is_the_only_one(told: Any) -> None:
    assert choice_of(SimpleNamespace(extra_args={"spider_sense_choice": told})) == (0, 1)
