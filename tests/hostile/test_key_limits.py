"""What a key may: its length, its scopes, its limits; and how a fresh one is made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import serving
from tests.hostile.keys import ADMIN, ANN, BEN, ask
from vecmill.__main__ import cli
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import KeyLimits, Scope


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("api_key", ",", "holds no key"),
        ("api_key", " , ,", "holds no key"),
        ("api_key", "fifteen-letters", "16 characters"),
        ("api_key", f"ann:{ANN},ben:short", "16 characters"),
        ("api_key", f"ann:{ANN} scopes=root", "scopes"),
        ("api_key", f"ann:{ANN} scopes=", "scopes"),
        ("api_key", f"ann:{ANN} requests=0", "`requests=N`"),
        ("api_key", f"ann:{ANN} requests=many", "`requests=N`"),
        ("api_key", f"ann:{ANN} limit=5", "`requests=N`"),
        ("api_key", f"an\nn:{ANN}", "control characters"),
        ("admin_api_key", "fifteen-letters", "16 characters"),
        ("admin_api_key", "sixteen letters!", "without spaces"),
        ("trusted_proxies", ",", "names none"),
        ("trusted_proxies", "10.0.0.1,proxy.example", "addresses and networks"),
        ("trusted_proxies", "10.0.0.1/8", "host bits"),
        ("allowed_hosts", ",", "names none"),
    ],
)
def test_a_key_that_locks_nothing_stops_the_start(setting: str, value: str, reason: str) -> None:
    with pytest.raises(StartupError) as stopped:
        load_settings({setting: value})
    assert stopped.value.message.startswith(f"{setting.upper()}")
    assert reason in stopped.value.message
    assert "\n" not in stopped.value.message
    if "key" in setting and value.strip(", "):
        assert value.rpartition(":")[2].split()[0] not in stopped.value.message


@pytest.mark.parametrize("given", [{"API_KEY": ","}, {"API_KEY": "short"}, {"ADMIN_API_KEY": "short"}])
def test_the_command_ends_with_two_and_one_sentence(given: dict[str, str]) -> None:
    ended = CliRunner().invoke(cli, ["serve"], env=given)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("vecmill: ")
    assert "short" not in ended.stderr.replace("shorter", "").split("is:")[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ann:short", "line 2: has a key of fewer than 16"),
        (f"ann:{ANN} scopes=root", "line 2: has scopes"),
        (f"{ANN} what=1", "line 2: has something"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(StartupError, match=reason) as stopped:
        load_settings({"api_key_file": str(file)})
    assert ANN not in stopped.value.message


def test_what_may_stand_after_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ann smith: {ANN} scopes=use,admin requests=8\n{BEN} tokens=1000 jobs=2\n")
    ann, ben = load_settings({"api_key_file": str(file)}).access.api_key
    assert (ann.name, ann.scopes, ann.limits) == ("ann smith", frozenset(Scope), KeyLimits(requests=8))
    assert (ben.name, ben.is_named, ben.limits) == ("line 2", False, KeyLimits(tokens=1000, jobs=2))
    assert ben.scopes == frozenset({Scope.USE})
    [key] = load_settings({"api_key": f"ci:{ANN} scopes=use+admin jobs=1"}).access.api_key
    assert (key.name, key.scopes, key.limits) == ("ci", frozenset(Scope), KeyLimits(jobs=1))


@pytest.mark.parametrize(
    "options",
    [[], ["laptop"], ["laptop", "--scopes", "use+admin", "--requests", "8", "--tokens", "900", "--jobs", "2"]],
)
def test_a_fresh_key_opens_a_server(tmp_path: Path, options: list[str]) -> None:
    made = CliRunner().invoke(cli, ["keys", "new", *options])
    assert made.exit_code == 0
    key, line = made.stdout.splitlines()
    other = CliRunner().invoke(cli, ["keys", "new", *options]).stdout.splitlines()[0]
    assert key != other
    assert len(key) >= 40
    (tmp_path / "keys").write_text(f"{line}\n{other}\n")
    entry = load_settings({"api_key_file": str(tmp_path / "keys")}).access.api_key[0]
    assert entry.key.get_secret_value() == key
    assert entry.name == (options[0] if options else "line 1")
    if len(options) > 1:
        assert (entry.scopes, entry.limits) == (frozenset(Scope), KeyLimits(8, 900, 2))


@pytest.mark.parametrize("options", [["a:b"], ["#a"], ["x" * 101], ["laptop", "--scopes", "root"]])
def test_no_line_is_made_that_would_not_be_read(options: list[str]) -> None:
    made = CliRunner().invoke(cli, ["keys", "new", *options])
    assert made.exit_code == 2
    assert not made.stdout


async def test_scopes() -> None:
    keys = f"ann:{ANN},ben:{BEN} scopes=admin"
    async with serving(api_key=keys) as client:
        text = {"inputs": "x"}
        assert (await ask(client, ANN, "POST", "/embed", json=text)).status_code == 200
        assert (await ask(client, ANN, "DELETE", "/cache")).status_code == 403
        for path, body in (
            ("/embed", text),
            ("/tokenize", text),
            ("/jobs", {"project": "p", "total_chunks": 1}),
            ("/v1/batches", {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h"}),
            ("/v1/files", None),
        ):
            refused = await ask(client, BEN, "POST", path, json=body)
            assert refused.status_code == 403, path
            assert "scope `use`" in refused.text
        job = (await ask(client, ANN, "POST", "/jobs", json={"project": "p", "total_chunks": 1})).json()["job_id"]
        assert (await ask(client, BEN, "GET", f"/jobs/{job}")).status_code == 200
        assert (await ask(client, BEN, "POST", f"/jobs/{job}/cancel")).status_code == 200
        assert (await ask(client, BEN, "DELETE", "/cache")).status_code == 200


async def test_a_key_has_so_many_open_jobs() -> None:
    async with serving(api_key=f"ann:{ANN} jobs=2,ben:{BEN}", admin_api_key=ADMIN) as client:
        body = {"project": "p", "total_chunks": 1}
        jobs = [await ask(client, ANN, "POST", "/jobs", json=body) for _ in range(3)]
        assert [answer.status_code for answer in jobs] == [200, 200, 429]
        assert "`jobs`" in jobs[2].json()["detail"]
        assert (await ask(client, BEN, "POST", "/jobs", json=body)).status_code == 200
        await ask(client, ANN, "POST", f"/jobs/{jobs[0].json()['job_id']}/complete")
        assert (await ask(client, ANN, "POST", "/jobs", json=body)).status_code == 200


@pytest.mark.parametrize("limit", ["requests=1", "tokens=50"])
async def test_a_key_has_so_much_in_progress_and_the_others_do_not_wait_for_it(limit: str) -> None:
    text = "some words that take their time " * 20
    async with serving(api_key=f"ann:{ANN} {limit},ben:{BEN}", queue_timeout=0) as client:

        async def embed(key: str, number: int) -> Any:
            return await ask(client, key, "POST", "/embed", json={"inputs": [f"{number} {text}"] * 40})

        answers = await asyncio.gather(*(embed(ANN, number) for number in range(4)), embed(BEN, 9))
        assert sorted(answer.status_code for answer in answers[:4]) == [200, 503, 503, 503]
        assert answers[4].status_code == 200
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert f"`{limit.partition('=')[0]}`" in refused.json()["error"]
        assert (await embed(ANN, 5)).status_code == 200
    async with serving(api_key=f"ann:{ANN} {limit},ben:{BEN}") as client:  # and by default they wait
        answers = await asyncio.gather(*(embed(ANN, number) for number in range(4)))
        assert {answer.status_code for answer in answers} == {200}
