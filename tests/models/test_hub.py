"""What the hub is asked for, what is fetched from it, and what is said when it cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from tests.hub_server import COMMIT, FILES, NAME, NEEDED, WEIGHTS, FakeHub, hub_here
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.engine import choice
from vecmill.engine.choice import chosen_sources
from vecmill.models import hub


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path) as fake:
        yield fake


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetch() -> Path:
    return hub.fetch(hub.plan(NAME, hf_token=None), hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_plan_names_sizes_licence_and_parameters_and_fetches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    found = hub.plan(NAME, hf_token=None)
    assert set(found.sizes) == set(found.missing) == NEEDED
    assert found.size == found.missing_size == sum(len(FILES[path]) for path in NEEDED)
    assert (found.commit, found.licence, found.memory) == (COMMIT, "apache-2.0", 8_000_000)
    assert not found.non_commercial
    assert fake.fetched() == []
    assert not list(tmp_path.rglob("refs"))  # a plan must not move what a server without network would serve


def test_memory_is_the_size_of_the_weight_files_where_the_hub_counts_no_parameters(fake: FakeHub) -> None:
    fake.parameters = None
    found = hub.plan(NAME, hf_token=None)
    assert (found.parameters, found.memory) == (None, len(WEIGHTS))


@pytest.mark.parametrize(
    ("card", "tags", "licence", "non_commercial"),
    [
        ({"license": "cc-by-nc-4.0"}, [], "cc-by-nc-4.0", True),
        ({"license": "other", "license_name": "acme-nc"}, [], "other, acme-nc", True),
        ({"license": ["mit", "cc-by-nc-sa-4.0"]}, [], "mit, cc-by-nc-sa-4.0", True),
        ({}, ["bert", "license:cc-by-nc-4.0"], "cc-by-nc-4.0", True),
        ({"license": "ncsa"}, [], "ncsa", False),
        ({"license": "x-ncsa"}, [], "x-ncsa", False),
        ({}, [], "not stated", False),
    ],
)
def test_licence(fake: FakeHub, card: dict[str, object], tags: list[str], licence: str, non_commercial: bool) -> None:
    fake.card, fake.tags = card, tags
    found = hub.plan(NAME, hf_token=None)
    assert (found.licence, found.non_commercial) == (licence, non_commercial)


def test_only_needed_files_are_fetched(fake: FakeHub) -> None:
    folder = fetch()
    assert sorted(fake.fetched()) == sorted(NEEDED)
    assert files_in(folder) == NEEDED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_without_a_tokenizer_json_the_vocabulary_is_fetched(fake: FakeHub) -> None:
    fake.files |= {"vocab.txt": b"[PAD]", "merges.txt": b"#", "nested/vocab.txt": b""}
    assert set(hub.plan(NAME, hf_token=None).sizes) == NEEDED
    del fake.files["tokenizer.json"]
    needed = NEEDED - {"tokenizer.json"} | {"vocab.txt", "merges.txt"}
    assert files_in(fetch()) == needed
    found = hub.cached(NAME)
    assert found is not None
    assert files_in(found) == needed


def test_before_the_weights_the_check_sees_the_vocabulary(fake: FakeHub) -> None:
    fake.files["vocab.txt"] = fake.files.pop("tokenizer.json")
    seen: list[set[str]] = []
    folder = hub.download(NAME, hf_token=None, check=lambda folder: seen.append(files_in(folder)))
    assert seen == [{"config.json", "1_Pooling/config.json", "vocab.txt"}]
    assert files_in(folder) == seen[0] | {"model.safetensors"}


def test_a_cut_connection_is_taken_up_where_it_broke(fake: FakeHub) -> None:
    fake.cuts = [5000]
    counts: list[tuple[int, int]] = []
    found = hub.plan(NAME, hf_token=None)
    folder = hub.fetch(
        found, hf_token=None, revision=None, report=lambda fetched, complete: counts.append((fetched, complete))
    )
    assert fake.ranges() == ["bytes=4096-"]  # whole chunks of 1024 were kept
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert max(counts) == counts[-1] == (found.missing_size, len(NEEDED))


def test_after_a_connection_that_stays_broken_only_the_rest_is_fetched(fake: FakeHub) -> None:
    fake.cuts = [0] * 6
    with pytest.raises(StartupError, match=r"^owner/tiny: .*RemoteProtocolError.*network.*complete files are kept"):
        fetch()
    fake.asked.clear()
    assert files_in(fetch()) == NEEDED
    assert "model.safetensors" in fake.fetched()
    assert set(fake.fetched()) < NEEDED


def test_a_truncated_file_is_named_and_removed_and_then_fetched_again(fake: FakeHub) -> None:
    weights = fetch() / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StartupError, match=r"^owner/tiny: .*removed: model.safetensors \(100 of 16,384 bytes\)"):
        fetch()
    fake.asked.clear()
    assert fetch() / "model.safetensors" == weights
    assert weights.read_bytes() == WEIGHTS
    assert fake.fetched() == ["model.safetensors"]


def test_a_file_of_another_size_than_the_metadata_says_is_refused(fake: FakeHub) -> None:
    fake.claimed = {"tokenizer.json": 99}
    with pytest.raises(StartupError, match=r"tokenizer.json \(283 of 99 bytes\)"):
        fetch()


def test_a_second_run_fetches_nothing(fake: FakeHub) -> None:
    fetch()
    fake.asked.clear()
    assert hub.plan(NAME, hf_token=None).missing == {}
    fetch()
    assert [path for _, path, _ in fake.asked if "/resolve/" in path] == []


def test_gated(fake: FakeHub) -> None:
    fake.token = "secret"
    with pytest.raises(StartupError, match=rf"^owner/tiny: .*gated.*{fake.endpoint}/owner/tiny.*HF_TOKEN"):
        hub.plan(NAME, hf_token=None)
    assert set(hub.plan(NAME, hf_token="secret").missing) == NEEDED


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("owner/other", None, "^owner/other: the hub has no such model.*HF_TOKEN"),
        (NAME, "v9", "^owner/tiny: the hub has no revision v9"),
        ("owner/bad name", None, "^owner/bad name: not a hub id"),
    ],
)
def test_unknown(fake: FakeHub, name: str, revision: str | None, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        hub.plan(name, hf_token=None, revision=revision)


@pytest.mark.parametrize(("status", "said"), [(500, "answered 500"), (403, "refuses the token .*HF_TOKEN")])
def test_a_hub_that_does_not_answer_well(fake: FakeHub, status: int, said: str) -> None:
    fake.status = status
    with pytest.raises(StartupError, match=said):
        hub.plan(NAME, hf_token=None)


def test_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port for discarding; nothing listens
    with pytest.raises(StartupError, match=r"connection to http://127.0.0.1:9 failed.*ConnectError"):
        hub.plan(NAME, hf_token=None)


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match=r"^owner/tiny: HF_HUB_OFFLINE=1 forbids"):
        hub.plan(NAME, hf_token=None)


def test_no_safetensors(fake: FakeHub) -> None:
    fake.files = {path: content for path, content in FILES.items() if path != "model.safetensors"}
    with pytest.raises(StartupError, match=r"has no \*.safetensors"):
        hub.plan(NAME, hf_token=None)


def test_a_full_disk_is_refused(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.plan(NAME, hf_token=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=found.missing_size))
    hub.require_space(found)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=found.missing_size - 1))
    with pytest.raises(StartupError, match=r"16.7 kB are missing and 16.7 kB are free in .*HF_HOME"):
        hub.require_space(found)


def test_a_cache_that_cannot_be_written_is_named(fake: FakeHub, tmp_path: Path) -> None:
    found = hub.plan(NAME, hf_token=None)
    (tmp_path / "models--owner--tiny").write_text("a file where the folder would be")
    with pytest.raises(StartupError, match=r"models--owner--tiny.* cannot be written \(Not a directory\).*HF_HOME"):
        hub.fetch(found, hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_a_complete_model_is_served_without_asking_the_hub(fake: FakeHub) -> None:
    folder = hub.download(NAME, hf_token=None)
    assert files_in(folder) == NEEDED
    fake.asked.clear()
    assert hub.download(NAME, hf_token=None) == folder
    assert hub.download(NAME, hf_token=None, revision=COMMIT) == folder
    assert fake.asked == []


def test_an_incomplete_model_is_completed_before_it_is_served(fake: FakeHub) -> None:
    weights = hub.download(NAME, hf_token=None) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    fake.asked.clear()
    hub.download(NAME, hf_token=None)
    assert fake.fetched() == ["model.safetensors"]


def test_a_folder_that_another_program_began_is_completed_before_it_is_served(fake: FakeHub) -> None:
    begun = Path(hf_hub_download(NAME, "tokenizer.json")).parent
    assert hub.download(NAME, hf_token=None) == begun
    assert files_in(begun) == NEEDED


def test_a_branch_that_moves_during_the_pull_is_refused(fake: FakeHub) -> None:
    before = replace(hub.plan(NAME, hf_token=None), commit="f" * 40)
    with pytest.raises(StartupError, match=f"moved from {before.commit} to {COMMIT}"):
        hub.fetch(before, hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_a_model_that_cannot_be_had_is_refused_with_everything_that_would_help(fake: FakeHub) -> None:
    with pytest.raises(StartupError, match=r"^owner/other: .*HF_HOME.*network.*HF_HUB_OFFLINE.*HF_TOKEN"):
        hub.download("owner/other", hf_token=None)


def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(fake: FakeHub) -> None:
    fake.files["config.json"] = b'{"model_type": "llama", "max_position_embeddings": 4096}'
    settings = load_settings({"embed_model": NAME}).model
    with pytest.raises(StartupError, match=r"EMBED_MODEL=owner/tiny: model_type 'llama' is not supported; supported: "):
        chosen_sources(settings, torch.device("cpu"))
    assert "model.safetensors" not in fake.fetched()
    assert "config.json" in fake.fetched()


SUPPORTED = b'{"model_type": "bert", "max_position_embeddings": 512}'


def test_a_revision_is_pinned_for_its_model(fake: FakeHub) -> None:
    fake.files["config.json"] = SUPPORTED
    settings = load_settings({"embed_model": f"auto,{NAME}", "revision": f"{NAME}={COMMIT}"}).model
    _, source = chosen_sources(settings, torch.device("cpu"))
    assert (source.id, source.folder.name) == (NAME, COMMIT)
    assert any(f"/revision/{COMMIT}" in path or f"/{COMMIT}/" in path for _, path, _ in fake.asked)
    unknown = load_settings({"embed_model": NAME, "revision": "nope"}).model
    with pytest.raises(StartupError, match=r"^EMBED_MODEL=owner/tiny: "):
        chosen_sources(unknown, torch.device("cpu"))


def test_auto_on_a_gpu_is_the_default_that_the_hub_gives(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.files["config.json"] = SUPPORTED
    monkeypatch.setattr(choice, "GPU_DEFAULTS", {Task.EMBED: NAME, Task.RERANK: "owner/absent"})
    told: list[str] = []
    [embedder] = chosen_sources(load_settings().model, torch.device("cuda"), told.append)
    assert embedder.id == NAME
    assert told[-1] == "fetching owner/tiny: 0.0 GB, 4 files complete"


def test_auto_on_a_gpu_without_its_default_is_the_bundled_model_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # and HF_HUB_OFFLINE, as all tests have it
    [embedder] = chosen_sources(load_settings().model, torch.device("cuda"))
    assert embedder.id == "sentence-transformers/all-MiniLM-L6-v2"
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "vecmill pull Qwen/Qwen3-Embedding-4B" in told[0]
    assert "ranked by cosine" in told[1]


def test_auto_on_a_cpu_is_the_bundled_model_and_no_reranker() -> None:
    [embedder] = chosen_sources(load_settings().model, torch.device("cpu"))
    assert embedder.id == "sentence-transformers/all-MiniLM-L6-v2"
