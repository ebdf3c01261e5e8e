"""`vecmill pull` as a person sees it: what is said before, while and after a download, and the exit code."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from rich.console import Console

from tests.hub_server import COMMIT, FILES, NAME, WEIGHTS, FakeHub, hub_here, served_hub
from vecmill import pull
from vecmill.pull import run_pull

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path) as fake:
        yield fake


def test_a_pull_says_what_it_will_fetch_and_then_where_it_is(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    assert run_pull(NAME) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT
    assert out.splitlines() == [
        f"folder    {folder}",
        f"revision  {COMMIT}",
        "serve     vecmill serve --embed-model owner/tiny",
    ]
    before, after = err.split("fetched", 1)
    assert before.splitlines() == [
        f"model     owner/tiny at {COMMIT}",
        "licence   apache-2.0",
        "size      16.7 kB in 4 files; 16.7 kB in 4 files to fetch",
        "memory    about 8.0 MB for the weights in bfloat16 (an estimate: 4,000,000 parameters of 2 bytes), "
        "and room for the batches besides",
    ]
    assert after.splitlines()[-2:] == [
        "fetched   16.7 kB of 16.7 kB, 4 of 4 files complete",
        "checked   every file has the size that the hub says",
    ]


def test_a_second_pull_says_that_everything_is_there(fake: FakeHub, capsys: Captured) -> None:
    run_pull(NAME)
    first = capsys.readouterr().out
    fake.asked.clear()
    assert run_pull(NAME) == 0
    out, err = capsys.readouterr()
    assert out == first
    assert "0 bytes in 0 files to fetch" in err
    assert "everything is there already" in err
    assert fake.fetched() == []


def test_a_pulled_revision_is_pinned_where_it_is_served(fake: FakeHub, capsys: Captured) -> None:
    assert run_pull(NAME, COMMIT) == 0
    serve = capsys.readouterr().out.splitlines()[-1]
    assert serve == f"serve     vecmill serve --embed-model {NAME} --revision {NAME}={COMMIT}"


def test_a_reranker_is_served_as_one(fake: FakeHub, capsys: Captured) -> None:
    fake.files["config.json"] = (
        b'{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "max_position_embeddings": 512}'
    )
    assert run_pull(NAME) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"serve     vecmill serve --rerank-model {NAME}"


def test_non_commercial_licence_is_a_warning(fake: FakeHub, capsys: Captured) -> None:
    fake.card = {"license": "cc-by-nc-4.0"}
    assert run_pull(NAME) == 0
    assert "licence   cc-by-nc-4.0\nwarning   non-commercial use only" in capsys.readouterr().err


def test_estimate_from_the_files(fake: FakeHub, capsys: Captured) -> None:
    fake.parameters = None
    assert run_pull(NAME) == 0
    assert "about 16.4 kB for the weights in bfloat16 (an estimate: the weight files' size" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(
        pull, "said", Console(file=terminal, force_terminal=True, width=120, soft_wrap=True, color_system=None)
    )
    assert run_pull(NAME) == 0
    assert "4 of 4 files" in terminal.getvalue()
    assert "16.7/16.7 kB" in terminal.getvalue()
    assert "fetched" not in terminal.getvalue()


def test_a_broken_file_is_named(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    run_pull(NAME)
    weights = tmp_path / "models--owner--tiny" / "snapshots" / COMMIT / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100)
    capsys.readouterr()
    assert run_pull(NAME) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "removed: model.safetensors (100 of 16,384 bytes): run the same command again" in err
    assert run_pull(NAME) == 0
    assert weights.read_bytes() == WEIGHTS


def test_the_token_of_the_settings_opens_a_gated_model(
    fake: FakeHub, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "secret"
    assert run_pull(NAME) == 1
    assert "gated: accept its terms at" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_pull(NAME) == 0
    assert "secret" not in "".join(capsys.readouterr())


def no_weights(fake: FakeHub, patch: pytest.MonkeyPatch) -> None:
    fake.files = {"config.json": FILES["config.json"], "modeling_tiny.py": FILES["modeling_tiny.py"]}


def full_disk(fake: FakeHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))


def offline(fake: FakeHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def nothing(fake: FakeHub, patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("model", "revision", "arrange", "said"),
    [
        (NAME, None, no_weights, "has no *.safetensors"),
        (NAME, None, full_disk, "10 bytes are free"),
        (NAME, None, offline, "HF_HUB_OFFLINE=1"),
        (NAME, "v9", nothing, "no revision v9"),
        ("owner/other", None, nothing, "no such model"),
        ("tiny", None, nothing, "not a hub id"),
        ("auto", None, nothing, "nothing to pull"),
    ],
)
def test_refused_in_one_sentence_before_anything_is_fetched(
    fake: FakeHub,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    revision: str | None,
    arrange: object,
    said: str,
) -> None:
    assert callable(arrange)
    arrange(fake, monkeypatch)
    assert run_pull(model, revision) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"vecmill: {model}")
    assert said in err.splitlines()[-1]
    assert fake.fetched() == []


def test_bad_settings_exit_as_serve_does(fake: FakeHub, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTYPE", "float99")
    assert run_pull(NAME) == 2
    assert "DTYPE='float99'" in capsys.readouterr().err


def test_ctrl_c_stops_a_file_in_the_middle(
    fake: FakeHub, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.Event] = []
    interruptible = pull._interruptible

    @contextmanager
    def watched() -> Iterator[threading.Event]:
        with interruptible() as stopped:
            seen.append(stopped)
            yield stopped

    def press() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        assert seen[0].wait(30)

    monkeypatch.setattr(pull, "_interruptible", watched)
    fake.interrupt = press
    assert run_pull(NAME) == 130
    assert "stopped" in capsys.readouterr().err
    cached = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in cached if path.suffix == ".incomplete" or path.stat().st_size == len(WEIGHTS)]
    fake.interrupt = lambda: None
    assert run_pull(NAME) == 0


def test_the_library_s_own_variables_work(tmp_path: Path) -> None:
    code = f"import sys; from vecmill.pull import run_pull; code = run_pull({NAME!r}); "
    code += "sys.exit(99 if 'torch' in sys.modules else code)"
    with served_hub() as fake:
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": fake.endpoint, "NO_PROXY": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=inherited | environment, cwd=tmp_path, capture_output=True, text=True
        )
    assert (done.returncode, done.stderr.count("\x1b")) == (0, 0)
    assert f"folder    {tmp_path / 'hub' / 'models--owner--tiny' / 'snapshots' / COMMIT}\n" in done.stdout
    assert "4 of 4 files complete" in done.stderr
