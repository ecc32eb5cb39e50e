"""The lessons of a run: harmful prompts with refusals, benign prompts with what the base model itself answers.

Answering takes the base model minutes, so its answers are kept in a file and not asked for again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nest.answers import generate_answers
from nest.lessons import Lesson, make_lessons
from nest.refusal_texts import refusal_for
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel

__all__ = ["make_curriculum", "own_answers"]

_AT_ONCE = 128
"""Prompts between two writes to the file of answers."""


def make_curriculum(
    loaded: LoadedModel,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    answers: Sequence[str],
    max_prompt: int,
    max_answer: int,
) -> list[Lesson]:
    """Return refusals for the harmful prompts, then the given answers for the benign ones.

    Args:
        loaded: renders the prompts.
        harmful: prompts to refuse.
        benign: N prompts to answer.
        answers: N texts, see :func:`own_answers`.
        max_prompt: tokens; longer prompts are cut in the middle.
        max_answer: tokens of an answer that are learned.
    """
    chat = Chat(loaded.tokenizer)
    refusals = [refusal_for(example.text) for example in harmful]
    return [
        *make_lessons(chat, harmful, refusals, "refuse", max_prompt, max_answer),
        *make_lessons(chat, benign, answers, "answer", max_prompt, max_answer),
    ]


def own_answers(
    loaded: LoadedModel,
    examples: Sequence[Example],
    weight_digest: str,
    cache: Path,
    tokens: int,
    prompt_tokens: int,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Return what the model answers greedily; answers that ``cache`` holds for the same model and prompt are reused.

    Args:
        loaded: the base model.
        examples: N prompts.
        weight_digest: of the model's fingerprint.
        cache: file of JSON lines, made or added to.
        tokens: length of the answers.
        prompt_tokens: longer prompts are cut in the middle, as they are for the lesson.
        advance: called with the number of prompts done.

    Raises:
        DataError: if the file holds something else.
    """
    known = dict(_known(cache))
    keys = [_key(weight_digest, example, tokens, prompt_tokens) for example in examples]
    missing = {key: example for key, example in zip(keys, examples, strict=True) if key not in known}
    if advance is not None:
        advance(len(examples) - len(missing))
    cache.parent.mkdir(parents=True, exist_ok=True)
    items = list(missing.items())
    for start in range(0, len(items), _AT_ONCE):
        part = items[start : start + _AT_ONCE]
        prompts = [example.turns or example.text for _, example in part]
        texts = generate_answers(
            loaded, prompts, max_new_tokens=tokens, max_prompt_tokens=prompt_tokens, advance=advance
        )
        fresh = {key: text for (key, _), text in zip(part, texts, strict=True)}
        with cache.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"key": key, "answer": text}) + "\n" for key, text in fresh.items())
        known |= fresh
    return [known[key] for key in keys]


def _known(cache: Path) -> Iterator[tuple[str, str]]:
    if not cache.exists():
        return
    content = cache.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        cache.write_bytes(whole)  # a run that was killed left half a line at the end
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            yield str(row["key"]), str(row["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{cache}, line {number}: holds no answer; delete the file, it is made again") from error


def _key(weight_digest: str, example: Example, tokens: int, prompt_tokens: int) -> str:
    prompt = example.turns or example.text
    code = json.dumps([weight_digest, prompt, tokens, prompt_tokens])
    return hashlib.sha256(code.encode("ascii")).hexdigest()[:24]
