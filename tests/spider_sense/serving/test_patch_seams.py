"""What of the patch's seams runs without vLLM: where a request's patch begins, and what its KV blocks are called."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError
from spider_sense.models import LoadedModel
from spider_sense.serving import block_keys, patch_seams
from spider_sense.serving.patch_seams import find_patch, patching, read_again, scheduling, switch_on
from spider_sense.serving.scheduler_seams import new_actor
from spider_sense.serving.settings import PATCHED, ServingSettings

SIZE = 4


@dataclass
class Step:
    """As vLLM's step, it is pickled to every rank."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)


class Request:
    """As much of vLLM's as is touched; a key is made of the one before, the tokens and extra keys."""

    def __init__(self, tokens: list[int], computed: int, salt: str | None = None) -> None:
        self.tokens, self.num_computed_tokens, self.salt = list(tokens), computed, salt
        self.num_prompt_tokens, self.num_output_tokens = len(tokens), 0
        self.is_prefill_chunk = False
        self.block_hashes: list[Any] = []
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        for start in range(len(self.block_hashes) * SIZE, len(self.tokens) - SIZE + 1, SIZE):
            keys, _ = block_keys._keyed(_own_keys, self, start, start + SIZE, 0)
            before = self.block_hashes[-1] if self.block_hashes else None
            self.block_hashes.append(hash((before, tuple(self.tokens[start : start + SIZE]), keys)))


def _own_keys(request: Any, start: int, end: int, place: int) -> tuple[tuple[Any, ...] | None, int]:
    return ((("cache_salt", request.salt),) if request.salt and not start else None), place


def scheduler(**requests: Request) -> Any:
    what = SimpleNamespace(requests=requests, hash_block_size=SIZE)
    setattr(what, patch_seams._DIGEST, "digest")
    return what


@pytest.mark.parametrize(("computed", "shared"), [(9, 2), (8, 2), (12, 3), (3, 0), (20, 5)])
def test_blocks_that_reach_past_the_first_patched_token_are_called_otherwise(computed: int, shared: int) -> None:
    tokens = list(range(20))
    plain, patched, again, elsewhere = (Request(tokens, computed) for _ in range(4))
    elsewhere.num_computed_tokens -= 1
    engine = scheduler(patched=patched, again=again, elsewhere=elsewhere)
    for name in engine.requests:
        switch_on(engine, name, 0, again=False)
    # Its answer goes on.
    for one in (plain, patched, again, elsewhere):
        one.tokens += [7, 8, 9, 10]
        one.update_block_hashes()
        assert len(one.block_hashes) == 6
    assert patched.block_hashes[:shared] == plain.block_hashes[:shared]
    assert not set(patched.block_hashes[shared:]) & set(plain.block_hashes)
    assert patched.block_hashes == again.block_hashes, "what is alike may be shared"
    assert not set(patched.block_hashes[shared:]) & set(elsewhere.block_hashes)


def test_keys_of_vllms_own_are_kept() -> None:
    request = Request(list(range(8)), 0, salt="s")
    switch_on(scheduler(a=request), "a", 2, again=False)
    assert block_keys._keyed(_own_keys, request, 0, 4, 5) == (
        (("cache_salt", "s"), ("spider_sense_patch", "digest@2")),
        5,
    )
    assert block_keys._keyed(_own_keys, Request([], 0), 4, 8, 5) == (None, 5)


def test_answers_are_kept_apart_where_a_head_reads_prompts_alone() -> None:
    tokens = list(range(16))
    answer, prompt, longer, plain = (Request(tokens[:count], 0) for count in (6, 16, 9, 6))
    engine = SimpleNamespace(added=[])
    block_keys._added(engine.added.append, engine, plain)
    block_keys.keep_answers_apart(engine)
    for request in (answer, prompt, longer):
        block_keys._added(engine.added.append, engine, request)
    assert engine.added == [plain, answer, prompt, longer]
    for request in (answer, longer, plain):
        request.tokens = tokens
        request.update_block_hashes()
    assert plain.block_hashes == prompt.block_hashes
    shared = [sum(map(eq, one.block_hashes, prompt.block_hashes)) for one in (answer, longer)]
    assert shared == [1, 2], "up to the block that the answer begins in"
    # A patch sets apart what is apart already.
    before = list(answer.block_hashes)
    engine.requests, engine.hash_block_size = {"a": answer}, SIZE
    setattr(engine, patch_seams._DIGEST, "digest")
    switch_on(engine, "a", 9, again=False)
    assert answer.block_hashes[:2] == before[:2]
    assert not set(answer.block_hashes[2:]) & set(before)


def test_a_patch_begins_once_and_stays_where_it_began() -> None:
    running, preempted = Request(list(range(20)), 9), Request(list(range(20)), 0)
    engine = scheduler(running=running, preempted=preempted, plain=Request([], 0), waiting=Request([], 0))
    # Where the scheduler looks ahead, it has counted a step of which nothing is known yet.
    switch_on(engine, "running", 8, again=False)
    # A preempted request begins anew, and its first eight tokens are to be what they were.
    switch_on(engine, "preempted", 8, again=False)
    running.num_computed_tokens, preempted.num_computed_tokens = 0, 15
    switch_on(engine, "running", 12, again=False)
    switch_on(engine, "preempted", 12, again=False)
    step = patch_seams._scheduled(lambda: Step({"running": 3, "preempted": 1, "plain": 4}), engine)
    assert getattr(step, PATCHED) == {"running": 9, "preempted": 8}
    assert getattr(pickle.loads(pickle.dumps(step)), PATCHED) == {"running": 9, "preempted": 8}
    assert getattr(patch_seams._scheduled(lambda: Step({"plain": 1}), engine), PATCHED) == {}


def reading(**requests: Request) -> Any:
    """Return a scheduler that reads prompts again, with requests that all run."""
    engine = scheduler(**requests)
    engine.running, engine.preempted = list(requests.values()), []

    def preempt(request: Request, timestamp: float, drop_stale_output: bool) -> None:
        assert drop_stale_output
        assert request not in engine.running
        engine.preempted.append(request)

    engine._preempt_request = preempt
    return engine


def test_a_request_without_an_answer_begins_once_more_under_the_patch() -> None:
    tokens = list(range(20))
    first, other, plain = (Request(tokens, 20) for _ in range(3))
    engine = reading(first=first, other=other)
    for name in engine.requests:
        assert read_again(engine, name)
        assert not read_again(engine, name)
        # The actor asks for both, and the position of the first stays.
        switch_on(engine, name, 20, again=True)
    assert (engine.preempted, engine.running) == ([first, other], [])
    assert first.is_prefill_chunk, "a draft that comes late is not taken for one of its own"
    assert first.block_hashes == other.block_hashes, "who reads the same prompt again may share what it computes"
    assert not set(first.block_hashes) & set(plain.block_hashes)
    step = patch_seams._scheduled(lambda: Step({"first": 20, "other": 4}), engine)
    assert getattr(step, PATCHED) == {"first": 0, "other": 0}


def test_who_cannot_be_read_again_is_patched_from_the_next_token_on() -> None:
    begun, waiting, otherwise = (Request(list(range(20)), 20) for _ in range(3))
    begun.num_output_tokens = 1
    engine = reading(begun=begun, waiting=waiting)
    engine.running.remove(waiting)
    other = scheduler(otherwise=otherwise)
    for name in engine.requests:
        assert not read_again(engine, name)
    for one, again in ((engine, True), (other, False)):
        for name in one.requests:
            switch_on(one, name, 20, again)
            assert getattr(one.requests[name], patch_seams._MARK) == 20
    assert (engine.preempted, engine.running) == ([], [begun])


def test_a_prompt_is_read_to_its_end_before_it_is_read_again() -> None:
    chunked, preempted = Request(list(range(20)), 12), Request(list(range(20)), 0)
    preempted.num_output_tokens = 3
    engine = reading(chunked=chunked, preempted=preempted)
    engine.running.remove(preempted)
    assert not read_again(engine, "chunked")
    switch_on(engine, "chunked", 12, again=True)
    assert not hasattr(chunked, patch_seams._MARK)
    # What it answered stands, wherever a preemption has put it.
    switch_on(engine, "preempted", 22, again=True)
    assert getattr(preempted, patch_seams._MARK) == 22
    chunked.num_computed_tokens = 20
    assert read_again(engine, "chunked")


def test_an_engine_without_a_patch_says_nothing_of_one() -> None:
    engine = SimpleNamespace(requests={"a": Request([], 0)})
    assert not hasattr(patch_seams._scheduled(lambda: Step({"a": 1}), engine), PATCHED)


def test_a_pass_is_patched_as_its_step_says_and_no_longer() -> None:
    seen: list[Any] = []
    patch = SimpleNamespace(begin=seen.append, rest=lambda: seen.append("rest"), rows=lambda *rows: seen.append(rows))
    runner = SimpleNamespace(
        **{patch_seams._PATCH: patch},
        input_batch=SimpleNamespace(req_ids=["a", "b", None], num_reqs=2, num_computed_tokens_cpu=[5, 0, 0]),
        query_start_loc=SimpleNamespace(np=[0, 1, 4, 9]),
    )
    step = Step()
    with patching(runner, step):
        seen.append("a step that nobody scheduled")
    setattr(step, PATCHED, {"a": 3})
    with patching(runner, step):
        assert patch_seams._packed_by_runner_1(lambda: "prepared", runner) == "prepared"
        batch = SimpleNamespace(req_ids=["b"], query_start_loc_np=[0, 2], num_computed_tokens_np=[8])
        assert patch_seams._packed_by_runner_2(lambda: batch, runner) is batch
    assert seen[:3] == [{}, "a step that nobody scheduled", "rest"]
    assert seen[3:] == [{"a": 3}, (["a", "b"], [0, 1, 4], [5, 0]), (["b"], [0, 2], [8]), "rest"]
    with patching(SimpleNamespace(), Step()):
        assert patch_seams._packed_by_runner_1(lambda: "prepared", SimpleNamespace()) == "prepared"


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], ServingSettings]:
    """Return a function that makes settings with a line of the policy."""

    def settings(patch: str) -> ServingSettings:
        (tmp_path / "policy.yaml").write_text(f"rules: []\n{patch}", encoding="utf-8")
        return ServingSettings(guard=tmp_path, policy=tmp_path / "policy.yaml")

    return settings


def test_a_policy_names_the_folder_of_its_patch_or_has_none(
    tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, told: Callable[[str], ServingSettings]
) -> None:
    assert find_patch(told("")) is None
    saved = tiny_patches.patch(tiny_loaded, alpha=0.75).save_pretrained(tmp_path / "patch")
    found = find_patch(told(f"patch: {{folder: {tmp_path / 'patch'}}}"))
    assert found is not None
    assert (found[0].digest, found[1]) == (saved.digest, 0.75)
    with pytest.raises(ConfigError, match=r"names no patch\.folder"):
        find_patch(told("patch: {alpha: 2}"))


def test_a_scheduler_that_could_not_say_who_is_patched_is_refused(
    tiny_loaded: LoadedModel,
    tiny_patches: Any,
    tmp_path: Path,
    told: Callable[[str], ServingSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scheduler:
        def schedule(self) -> None: ...

    class Heir(Scheduler): ...

    class Own(Scheduler):
        def schedule(self) -> None: ...

    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.scheduler", SimpleNamespace(Scheduler=Scheduler))
    saved = tiny_patches.patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    settings, heir = told(f"patch: {{folder: {tmp_path / 'patch'}}}"), Heir()
    scheduling(heir, settings)
    assert getattr(heir, patch_seams._DIGEST) == saved.digest
    with pytest.raises(ConfigError, match="Own makes up its steps by itself"):
        scheduling(Own(), settings)
    scheduling(Own(), told(""))


@pytest.mark.parametrize(
    ("looks_ahead", "message"), [(True, "serve with --no-async-scheduling"), (False, "take a step's token back")]
)
def test_a_scheduler_that_could_not_read_again_is_refused(
    looks_ahead: bool, message: str, told: Callable[[str], ServingSettings]
) -> None:
    options = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=looks_ahead))
    scheduler = SimpleNamespace(vllm_config=options, _preempt_request=lambda request, timestamp: None)
    with pytest.raises(ConfigError, match=message):
        new_actor(scheduler, told("on_missing: patch\npatch: {folder: p, begin: prompt}"))
