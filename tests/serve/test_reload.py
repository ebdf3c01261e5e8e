"""SIGHUP: keys and aliases change while the server runs; a mistake changes nothing, and never opens the server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.faults.service import Service, service, until
from tests.held_server import held
from tests.tiny_checkpoints import tiny_bert

OLD, NEW, OF_FILE = "the-first-secret", "the-second-secret", "the-third-secret"


@dataclass
class Locked:
    """A server with keys, and the files that it has them from."""

    server: Service
    settings: Path
    keys: Path
    gate: Path

    def write(self, keys: str | None = OF_FILE, **settings: str) -> None:
        """Write both files; None: no file of keys is named."""
        if keys is not None:
            self.keys.write_text(keys)
            self.keys.chmod(0o600)
            settings = {"API_KEY_FILE": str(self.keys), **settings}
        self.settings.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def reload(self) -> str:
        """Have it read the files; what it says to that."""
        log_before = self.server.log()
        self.server.signal(signal.SIGHUP)
        return until(lambda: self.server.log()[len(log_before) :].partition("SIGHUP: ")[2].partition("\n")[0])

    def ask(self, key: str, model: str | None = None, text: str = "x") -> int:
        """The status of a request with a key."""
        headers = {"Authorization": f"Bearer {key}"}
        body = {"input": text, "model": model}
        return httpx.post(f"{self.server.url}/v1/embeddings", json=body, headers=headers, timeout=60).status_code

    def aliases(self, key: str) -> list[str]:
        """What the list of models shows."""
        listed = self.server.http.get("/v1/models", headers={"x-api-key": key}).json()
        aliases: list[str] = listed["data"][0]["aliases"]
        return aliases


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("reload")
    (gate := folder / "gate").touch()
    tiny, settings = tiny_bert(folder / "tiny", minilm_folder), folder / "settings.env"
    serve = ("-m", "tests.held_server", str(gate), "--env-file", str(settings), "--admin-api-key", "the-admin-secret")
    with service(tiny, folder / "state", folder / "log", {"STRICT_MODEL": "true"}, serve=serve) as server:
        guarded = Locked(server, settings, folder / "keys", gate)
        guarded.write(API_KEY=f"editor:{OLD}")
        server.start()
        yield guarded


@pytest.fixture(autouse=True)
def as_begun(locked: Locked) -> None:
    """Each test begins with the old key, the file's, and no alias."""
    locked.write(API_KEY=f"editor:{OLD}")
    locked.reload()


def test_a_key_is_exchanged_and_what_runs_goes_on(locked: Locked) -> None:
    assert [locked.ask(key) for key in (OLD, OF_FILE, NEW)] == [200, 200, 401]
    with ThreadPoolExecutor(1) as pool:
        with held(locked.gate):
            running = pool.submit(locked.ask, OLD, None, "in progress")
            until(lambda: locked.server.http.get("/stats", headers={"x-api-key": OLD}).json()["gpu_busy"])
            locked.write(f"# a comment\n\neditor:{NEW}\n")
            assert locked.reload() == "keys: gone line 1; changed editor"
            assert [locked.server.http.get("/stats", headers={"x-api-key": key}).status_code for key in (OLD, NEW)] == [
                401,
                200,
            ]
            assert not running.done()
        assert running.result(60) == 200
    assert [locked.ask(key) for key in (OLD, OF_FILE, NEW)] == [401, 401, 200]


def test_a_flag_wins_and_what_cannot_change_now_is_named(locked: Locked) -> None:
    locked.write(API_KEY=f"editor:{OLD}", ADMIN_API_KEY=NEW, MAX_QUEUED_TOKENS="3000000", GENERATION_API_KEY="hidden")
    assert locked.reload() == "nothing has changed"
    until(lambda: "GENERATION_API_KEY, MAX_QUEUED_TOKENS changed too" in locked.server.log())
    assert [locked.ask(key) for key in ("the-admin-secret", NEW)] == [200, 401]


def test_aliases_are_exchanged(locked: Locked) -> None:
    assert locked.ask(OLD, "small") == 404
    locked.write(API_KEY=f"editor:{OLD}", MODEL_ALIASES="small=tiny,other=small")
    assert locked.reload() == "MODEL_ALIASES: small=tiny, other=small"
    assert [locked.ask(OLD, name) for name in ("small", "other", "tiny", "nope")] == [200, 200, 200, 404]
    assert locked.aliases(OLD) == ["small", "other"]
    locked.write(API_KEY=f"editor:{OLD}", MODEL_ALIASES="third=tiny")
    locked.reload()
    assert [locked.ask(OLD, name) for name in ("small", "third")] == [404, 200]
    for wrong, why in (("a=nowhere", "nowhere is not loaded"), ("tiny=tiny", "a model's own name"), ("a", "alias=")):
        locked.write(API_KEY=f"editor:{NEW}", MODEL_ALIASES=wrong)
        assert why in locked.reload()
        assert [locked.ask(OLD, "third"), locked.ask(NEW)] == [200, 401]


def test_a_mistake_changes_nothing_and_never_opens_the_server(locked: Locked) -> None:
    def stays(why: str) -> None:
        message = locked.reload()
        assert message.startswith("nothing is changed: ")
        assert why in message
        assert [locked.ask(key) for key in (OLD, OF_FILE, NEW, "none")] == [200, 200, 401, 401]

    locked.write(API_KEY=NEW, MAX_BATCH_SIZE="many")
    stays("MAX_BATCH_SIZE")
    for keys, why in (("", "holds no key"), ("# none\n", "holds no key"), ("two words", "line 1"), (NEW, "twice")):
        locked.write(keys, API_KEY=NEW)
        stays(why)
    locked.keys.unlink()
    stays("cannot be read")
    locked.write(None)
    stays("restart")
    locked.settings.unlink()
    stays("settings.env cannot be read")


def test_others_who_can_read_the_keys_are_warned_of(locked: Locked) -> None:
    locked.keys.chmod(0o644)
    locked.reload()
    until(lambda: "can be read by other users" in locked.server.log())


def test_no_key_is_in_the_log(locked: Locked) -> None:
    assert "secret" not in locked.server.log()
