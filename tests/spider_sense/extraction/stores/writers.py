"""What the tests of stores run in processes of their own: ``python writers.py add|load PLACE ...``."""

import random
import sys

from spider_sense.extraction.stores import Entry, open_store


def plus_one(old: Entry | None) -> Entry:
    """Count; the rest of the state is there so that it has the size of a real one."""
    count = int.from_bytes(old.state[:8]) if old else 0
    return Entry((count + 1).to_bytes(8) + bytes(4000), "odd" if count % 2 == 0 else "")


def add(place: str, updates: int) -> None:
    """Count up three principals that other processes count up too."""
    store = open_store(place, 60.0)
    for _ in range(updates):
        store.update(dict.fromkeys(random.sample(("ann", "bob", "cid"), 2), plus_one))
    store.close()


def load(place: str, seed: int) -> None:
    """Count up random principals for ever, and print each count once it is acknowledged."""
    store, order = open_store(place, 60.0), random.Random(seed)
    while True:
        names = order.sample([f"{seed}-{number}" for number in range(50)], 8)
        for name, entry in store.update(dict.fromkeys(names, plus_one)).items():
            sys.stdout.write(f"{name} {int.from_bytes(entry.state[:8])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    {"add": add, "load": load}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
