"""The exit code is 2 for any error that a restart cannot cure, and 1 for any that it may cure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_checkpoints import tiny_bert
from vecmill.app import create_app
from vecmill.config import load_settings
from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.serve.http_server import listen

QUICK = {"device": "cpu", "dtype": "float32", "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny"), minilm_folder)


async def start(**flags: object) -> tuple[bool, str]:
    """Whether a start that fails blames the settings, and with what sentence."""
    reasons: list[str] = []
    app = create_app(load_settings({**QUICK, **flags}), reasons.append)
    async with app.router.lifespan_context(app):
        await app.state.loading
    assert len(reasons) == 1, reasons
    return app.state.server.misconfigured, reasons[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"embed_model": "~nobody-here/model"}, "no such folder"),
        ({"model_aliases": "a=nowhere"}, "nowhere is not loaded"),
        ({"rerank_model": "TINY"}, "this is an embedding model"),
        ({"device": "mps"}, "no Apple GPU"),
        ({"redis_url": "redis://:a-secret@127.0.0.1:1/0?no_such_option=1"}, "REDIS_URL has an option"),
        ({"redis_url": "redis://:a-secret@127.0.0.1:1/0?socket_timeout=soon"}, "REDIS_URL has an option"),
    ],
)
async def test_wrong_settings(flags: dict[str, object], message: str, tiny: Path, tmp_path: Path) -> None:
    given = {name: str(tiny) if value == "TINY" else value for name, value in flags.items()}
    misconfigured, reason = await start(**{"embed_model": str(tiny), "state_dir": tmp_path / "state", **given})
    assert message in reason
    assert misconfigured
    assert "a-secret" not in reason


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_bytes(b"{")
    return folder


async def test_a_broken_model_is_not_cured_by_a_restart(broken: Path, tmp_path: Path) -> None:
    misconfigured, reason = await start(embed_model=str(broken), state_dir=tmp_path / "state")
    assert misconfigured, reason


async def test_a_hub_that_is_away_may_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    misconfigured, reason = await start(embed_model="nobody/nothing", state_dir=tmp_path / "state")
    assert "the hub gave no answer" in reason
    assert not misconfigured


async def test_a_fault_of_ours_is_told_without_its_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("/a/path of the inside")

    monkeypatch.setattr("vecmill.app.assemble", broken)
    misconfigured, reason = await start(embed_model=str(tiny), state_dir=tmp_path / "state")
    assert (misconfigured, reason) == (False, "The start failed (RuntimeError); the log says why.")


async def test_a_state_that_cannot_be_opened_for_any_reason_ends_the_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("not thought of")

    monkeypatch.setattr("vecmill.state.StateFolder.open", broken)
    assert await start(embed_model=str(tiny)) == (False, "The start failed (ValueError); the log says why.")


def test_an_address_that_may_be_there_later() -> None:
    with pytest.raises(StartupObstacle, match="set HOST to an address of this machine"):
        listen("203.0.113.77", 0)
    taken = listen("127.0.0.1", 0)
    with pytest.raises(StartupObstacle, match="another PORT"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


@pytest.mark.parametrize("host", ["256.1.1.1.1", "a" * 70, "::g", "no such name"])
def test_an_address_that_is_none(host: str) -> None:
    with pytest.raises(StartupError, match="set HOST to an address of this machine") as error:
        listen(host, 0)
    assert not isinstance(error.value, StartupObstacle)
