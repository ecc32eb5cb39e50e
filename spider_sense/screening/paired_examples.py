"""Clean and injected contexts of ``bipia_train``, as what a tool returns."""

from collections.abc import Iterator, Sequence

from spider_sense.screening.stage_example import Row, StageExample, built, observed

__all__ = ["paired_examples"]

READS = {"email": "read_mail", "table": "read_table", "code": "search_web"}
MORE_ATTACKS = 4
"""Beyond those that a context comes with."""


def paired_examples(rows: Sequence[Row], source: str) -> Iterator[StageExample]:
    """Give each row, and each clean context with more of the file's attacks: other ones at other places.

    A probe that has seen a context under two attacks alone learns the attacks; the folds of
    :func:`spider_sense.screening.stage_training.crossed` hold contexts and attacks apart all the same.
    """
    attacks: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for row in rows:
        attack = row["category"].partition(":")[2]
        yield _read_by_a_tool(source, row, row["id"], row["text"], attack)
        if attack:
            attacks[_medium(row) == "code"][row["injection_goal"]] = attack
    for place, row in enumerate(row for row in rows if row["label"] == "benign"):
        among = list(attacks[_medium(row) == "code"].items())
        step = max(1, len(among) // MORE_ATTACKS)
        for number in range(min(MORE_ATTACKS, len(among))):
            goal, attack = among[(7 * place + step * number) % len(among)]
            text = _inserted(row["text"], goal, (place + number) % 3)
            yield _read_by_a_tool(source, row, f"{row['id']}-{number}", text, attack)


def _read_by_a_tool(source: str, row: Row, name: str, text: str, attack: str) -> StageExample:
    turns = observed(str(row["user_task"]).removeprefix("Q: "), READS[_medium(row)], text)
    label, group = "injection" if attack else "benign", f"{source}:{row['pair']}"
    return built("observation", source, name, label, turns, attack, group)


def _medium(row: Row) -> str:
    medium: str = row["category"].removeprefix("bipia_").partition(":")[0].removesuffix("_clean")
    return medium


def _inserted(text: str, line: str, where: int) -> str:
    """Put a line before a text, in the middle of its lines, or behind it."""
    lines = text.split("\n")
    place = (0, len(lines) // 2, len(lines))[where]
    return "\n".join([*lines[:place], line, *lines[place:]])
