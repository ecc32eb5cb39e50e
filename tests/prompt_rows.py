"""Rows of a prompt set."""

from spider_sense.data import Example

__all__ = ["example", "many"]


def example(name: str, label: str, source: str = "set", group: str | None = None) -> Example:
    return Example(id=name, text=f"text {name}", label=label, category="", source=source, group=group or name)


def many(source: str, count: int) -> list[Example]:
    """Return rows of one file, a quarter of them harmful."""
    return [example(f"{source}-{n}", "harmful" if n % 4 == 0 else "benign", source) for n in range(count)]
