"""`vecmill pull` as a person sees it: what is said before, while and after a download, and the exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file

from tests.hub_server import COMMIT, FILES, NAME, WEIGHTS, FakeHub, hub_here, served_hub
from vecmill.models import hub
from vecmill.models.checkpoint import read
from vecmill.models.source import find
from vecmill.tools import pull
from vecmill.tools.pull import run_pull, run_pull_as_json

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
    fake.received.clear()
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
        b'{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "max_position_embeddings": 512, '
        b'"id2label": {"0": "LABEL_0"}}'
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
        pull, "messages", Console(file=terminal, force_terminal=True, width=120, soft_wrap=True, color_system=None)
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
    ("model", "revision", "arrange", "reason"),
    [
        (NAME, None, no_weights, "has no model.safetensors"),
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
    reason: str,
) -> None:
    assert callable(arrange)
    arrange(fake, monkeypatch)
    assert run_pull(model, revision) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"vecmill: {model}")
    assert reason in err.splitlines()[-1]
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
    code = f"import sys; from vecmill.tools.pull import run_pull; code = run_pull({NAME!r}); "
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


CONFIG = b'{"model_type": "bert", "max_position_embeddings": 512}'


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def pickled(weights: object, *, zipped: bool = True) -> bytes:
    written = io.BytesIO()
    torch.save(weights, written, _use_new_zipfile_serialization=zipped)
    return written.getvalue()


def tied() -> dict[str, torch.Tensor]:
    """Two names for one tensor, and a part of it."""
    words = torch.randn(50, 8)
    return {"words": words, "decoder": words, "first": words[:3], "bias": torch.ones(8)}


def only_pickles(fake: FakeHub, content: bytes) -> None:
    fake.files = {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "pytorch_model.bin": content,
    }


def test_pickles_are_converted_once_where_that_is_asked_for(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    weights = tied()
    only_pickles(fake, pickled(weights))
    assert run_pull(NAME) == 1
    assert "only pickled weights" in capsys.readouterr().err
    assert run_pull(NAME, convert_pickle=True) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "home" / "vecmill" / "models--owner--tiny" / "snapshots" / COMMIT
    assert out.splitlines() == [
        f"folder    {folder}",
        f"revision  {COMMIT}",
        "serve     vecmill serve --embed-model owner/tiny",
    ]
    assert "converting pytorch_model.bin to model.safetensors" in err
    made = load_file(folder / "model.safetensors")
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in weights.items())
    assert (folder / "config.json").read_bytes() == CONFIG
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not list((tmp_path / "models--owner--tiny").rglob("*.safetensors"))
    assert sorted(path.name for path in folder.parent.iterdir()) == [COMMIT]  # nothing is left of the work
    fake.received.clear()
    source = find(NAME)  # from now on it is served by its name, and the hub is not asked
    assert (source.folder, read(source).revision, fake.received) == (folder, COMMIT, [])
    assert run_pull(NAME, convert_pickle=True) == 0
    assert "this was done before" in capsys.readouterr().err


@pytest.mark.nightly
def test_pickles_in_parts_are_converted_part_by_part(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    parts = {f"pytorch_model-0000{number}-of-00002.bin": {f"w{number}": torch.ones(number)} for number in (1, 2)}
    index = {name: part for part, weights in parts.items() for name in weights}
    only_pickles(fake, b"")
    del fake.files["pytorch_model.bin"]
    fake.files["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    fake.files |= {part: pickled(weights, zipped=False) for part, weights in parts.items()}
    assert run_pull(NAME, convert_pickle=True) == 0
    folder = Path(capsys.readouterr().out.splitlines()[0].split()[-1])
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] == {
        "w1": "model-00001-of-00002.safetensors",
        "w2": "model-00002-of-00002.safetensors",
    }
    assert torch.equal(load_file(folder / "model-00002-of-00002.safetensors")["w2"], torch.ones(2))


def test_a_folder_s_pickles_are_converted_too(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(pickled(tied()))
    assert run_pull(str(folder), convert_pickle=True) == 0
    made = Path(capsys.readouterr().out.splitlines()[0].split()[-1])
    assert (made.name, "model.safetensors" in os.listdir(made)) == ("mine", True)
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


@pytest.mark.nightly
def test_the_pickles_of_modules_are_converted_with_the_others(fake: FakeHub, capsys: Captured) -> None:
    dense = {"linear.weight": torch.ones(2, 8)}
    only_pickles(fake, pickled({"w": torch.ones(8)}))
    module = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    fake.files |= {"modules.json": json.dumps([module]).encode(), "2_Dense/config.json": b"{}"}
    fake.files["2_Dense/pytorch_model.bin"] = pickled(dense)
    assert run_pull(NAME, convert_pickle=True) == 0
    assert "converting 2_Dense/pytorch_model.bin" in capsys.readouterr().err
    folder = hub.cached(NAME)
    assert folder is not None
    torch.testing.assert_close(load_file(folder / "2_Dense" / "model.safetensors"), dense)


@pytest.mark.nightly
def test_a_folder_s_changed_pickles_are_converted_anew(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    """Of the same size and time; its other files count too."""
    folder, now = tmp_path / "mine", 1_700_000_000
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")

    def converted(config: bytes, value: float) -> tuple[Path, str]:
        (folder / "config.json").write_bytes(config)
        (folder / "pytorch_model.bin").write_bytes(pickled({"w": torch.full((8,), value)}))
        os.utime(folder / "pytorch_model.bin", (now, now))
        assert run_pull(str(folder), convert_pickle=True) == 0
        out, err = capsys.readouterr()
        return Path(out.splitlines()[0].split()[-1]), err

    first, _ = converted(CONFIG, 1)
    again, output = converted(CONFIG, 1)
    assert (again, "done before" in output) == (first, True)
    second, output = converted(CONFIG, 2)
    assert (second, "done before" in output) == (first, False)
    assert load_file(second / "model.safetensors")["w"].tolist() == [2] * 8
    third, output = converted(CONFIG + b" ", 2)
    assert ((third / "config.json").read_bytes(), "done before" in output) == (CONFIG + b" ", False)
    assert [path.name for path in third.parent.iterdir()] == ["mine"]  # nothing is left of those before


def test_a_folder_with_a_broken_index_of_pickles(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pytorch_model.bin.index.json").write_text("{")
    assert run_pull(str(tmp_path / "mine"), convert_pickle=True) == 1
    assert "pytorch_model.bin.index.json has no `weight_map`" in capsys.readouterr().err


def test_safetensors_are_pulled_though_a_conversion_is_asked_for(fake: FakeHub, capsys: Captured) -> None:
    assert run_pull(NAME, convert_pickle=True) == 0
    assert "nothing: the model has safetensors" in capsys.readouterr().err
    assert "pytorch_model.bin" not in fake.fetched()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda ran: pickled({"a": torch.ones(3), "b": Hostile(f"touch {ran}")}), "asks for `posix.system` when it is"),
        pytest.param(
            lambda ran: pickled({"b": Hostile(f"touch {ran}")}, zipped=False),
            "asks for `posix.system` when it is loaded",
            marks=pytest.mark.nightly,
        ),
        (lambda ran: pickle.dumps(Hostile(f"touch {ran}")), "is damaged or no pickle of weights"),
        (lambda ran: pickled({"a": torch.zeros(1).expand(10**13)}), "says that it has more values than are in it"),
        pytest.param(
            lambda ran: pickled({"a": torch.zeros(1000, 1000)})[:2_000_000],
            "is damaged or no pickle of weights",
            marks=pytest.mark.nightly,
        ),
        pytest.param(lambda ran: b"", "is damaged or no pickle of weights", marks=pytest.mark.nightly),
        pytest.param(lambda ran: b"weights", "is damaged or no pickle of weights", marks=pytest.mark.nightly),
        pytest.param(
            lambda ran: pickled([torch.ones(3)]), "is not a table of weights by name", marks=pytest.mark.nightly
        ),
        pytest.param(
            lambda ran: pickled({"model": {"a": torch.ones(3)}}),
            "has something else in it than weights by name",
            marks=pytest.mark.nightly,
        ),
        (lambda ran: pickled({"a": torch.ones(3).to_sparse()}), "has something else in it than weights by name"),
    ],
)
def test_a_pickle_that_is_not_of_weights_is_refused_in_one_sentence(
    fake: FakeHub, tmp_path: Path, capsys: Captured, content: Callable[[Path], bytes], reason: str
) -> None:
    only_pickles(fake, content(tmp_path / "ran"))
    assert run_pull(NAME, convert_pickle=True) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("vecmill: owner/tiny: pytorch_model.bin ")
    assert reason in last
    assert out == ""
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no namespaces")
def test_a_pickle_s_process_reaches_no_network() -> None:
    code = "import socket; from vecmill.models.pickles import _leave_network as leave; print(leave()); "
    with socket.create_server(("127.0.0.1", 0)) as server:
        code += f"print(socket.socket().connect_ex({server.getsockname()!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    confined, failed = done.stdout.split()
    if confined == "False":
        pytest.skip("this system gives no process a network of its own")
    assert int(failed) == errno.ENETUNREACH


def test_a_program_is_told_in_json(fake: FakeHub, tmp_path: Path, capsys: Captured) -> None:
    assert run_pull_as_json(NAME) == 0
    *progress, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [told["fetched"] for told in progress] == sorted(told["fetched"] for told in progress)
    assert all(told["size"] == last["size"] for told in progress)
    assert last["folder"] == str(tmp_path / "models--owner--tiny" / "snapshots" / COMMIT)
    assert (last["fetched"], last["revision"]) == (last["size"], COMMIT)
    for name, said in (("owner/other", "no such model"), ("auto", "bundled"), ("tiny", "owner/name")):
        assert run_pull_as_json(name) == 1
        [told] = map(json.loads, capsys.readouterr().out.splitlines())
        assert said in told["error"]
