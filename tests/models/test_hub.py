"""What the hub is asked for, what is fetched from it, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from tests import hub_server
from tests.hub_server import COMMIT, FILES, NAME, NEEDED, WEIGHTS, FakeHub, hub_here
from vecmill.config import load_settings
from vecmill.core.errors import StartupError
from vecmill.core.types import Task
from vecmill.engine import loader
from vecmill.engine.loader import chosen_sources
from vecmill.models import hub
from vecmill.models.source import BUNDLED_ID, find


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_here(tmp_path) as fake:
        yield fake


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetch() -> Path:
    return hub.fetch(hub.plan(NAME, hf_token=None), hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_plan_names_sizes_licence_and_parameters_and_fetches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    plan = hub.plan(NAME, hf_token=None)
    assert set(plan.sizes) == set(plan.missing) == NEEDED
    assert plan.size == plan.missing_size == sum(len(FILES[path]) for path in NEEDED)
    assert (plan.commit, plan.licence, plan.memory) == (COMMIT, "apache-2.0", 8_000_000)
    assert not plan.non_commercial
    assert fake.fetched() == []
    assert not list(tmp_path.rglob("refs"))  # a plan must not move what a server without network would serve


def test_memory_is_the_size_of_the_weight_files_where_the_hub_counts_no_parameters(fake: FakeHub) -> None:
    fake.parameters = None
    plan = hub.plan(NAME, hf_token=None)
    assert (plan.parameters, plan.memory) == (None, len(WEIGHTS))


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
    plan = hub.plan(NAME, hf_token=None)
    assert (plan.licence, plan.non_commercial) == (licence, non_commercial)


def test_only_needed_files_are_fetched(fake: FakeHub) -> None:
    folder = fetch()
    assert sorted(fake.fetched()) == sorted(NEEDED)
    assert files_in(folder) == NEEDED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def with_heads(fake: FakeHub, file: str) -> None:
    """A Dense, and the folder of another that modules.json does not list, as Stella has them."""
    entries = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    types = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in entries]
    fake.files["modules.json"] = json.dumps(types).encode()
    for folder in ("2_Dense", "2_Dense_1024"):
        fake.files |= {f"{folder}/config.json": b"{}", f"{folder}/{file}": b"weights"}


def test_the_weights_of_the_modules_are_fetched(fake: FakeHub) -> None:
    with_heads(fake, "model.safetensors")
    own = {"modules.json", "2_Dense/config.json", "2_Dense_1024/config.json", "2_Dense/model.safetensors"}
    plan = hub.plan(NAME, hf_token=None)
    assert set(plan.sizes) == NEEDED | own
    assert hub.cached(NAME) is None
    assert files_in(hub.download(NAME, hf_token=None)) == NEEDED | own
    assert hub.cached(NAME) is not None


def test_a_table_of_token_vectors_may_have_a_folder_of_its_own(fake: FakeHub) -> None:
    entry = {"path": "0_StaticEmbedding", "type": "sentence_transformers.models.StaticEmbedding"}
    own = {f"0_StaticEmbedding/{name}": FILES[name] for name in ("model.safetensors", "tokenizer.json")}
    fake.files = {"modules.json": json.dumps([entry]).encode(), **own}
    wanted = {"modules.json", *own}
    assert set(hub.plan(NAME, hf_token=None).sizes) == wanted
    seen: list[set[str]] = []
    folder = hub.download(NAME, hf_token=None, check=lambda folder: seen.append(files_in(folder)))
    assert seen == [wanted - {"0_StaticEmbedding/model.safetensors"}]
    assert files_in(folder) == wanted
    assert hub.cached(NAME) == folder


def test_a_module_with_a_pickle_alone_is_refused_before_any_weights_are_fetched(fake: FakeHub) -> None:
    with_heads(fake, "pytorch_model.bin")
    with pytest.raises(StartupError, match="2_Dense/ has only a pickle"):
        hub.download(NAME, hf_token=None)
    assert "model.safetensors" not in fake.fetched()


def test_chat_templates_are_fetched_before_the_weights(fake: FakeHub) -> None:
    fake.files["chat_template.jinja"] = fake.files["additional_chat_templates/score.jinja"] = b"{{ messages }}"
    seen: list[set[str]] = []
    hub.download(NAME, hf_token=None, check=lambda folder: seen.append(files_in(folder)))
    assert seen == [NEEDED - {"model.safetensors"} | {"chat_template.jinja", "additional_chat_templates/score.jinja"}]


def test_without_a_tokenizer_json_the_vocabulary_is_fetched(fake: FakeHub) -> None:
    fake.files |= {"vocab.txt": b"[PAD]", "merges.txt": b"#", "nested/vocab.txt": b""}
    assert set(hub.plan(NAME, hf_token=None).sizes) == NEEDED
    del fake.files["tokenizer.json"]
    needed = NEEDED - {"tokenizer.json"} | {"vocab.txt", "merges.txt"}
    assert files_in(fetch()) == needed
    cached = hub.cached(NAME)
    assert cached is not None
    assert files_in(cached) == needed


def test_before_the_weights_the_check_sees_the_vocabulary(fake: FakeHub) -> None:
    fake.files["vocab.txt"] = fake.files.pop("tokenizer.json")
    seen: list[set[str]] = []
    folder = hub.download(NAME, hf_token=None, check=lambda folder: seen.append(files_in(folder)))
    assert seen == [{"config.json", "1_Pooling/config.json", "vocab.txt"}]
    assert files_in(folder) == seen[0] | {"model.safetensors"}


def test_a_cut_connection_is_taken_up_where_it_broke(fake: FakeHub) -> None:
    fake.cuts = [5000]
    counts: list[tuple[int, int]] = []
    plan = hub.plan(NAME, hf_token=None)
    folder = hub.fetch(
        plan, hf_token=None, revision=None, report=lambda fetched, complete: counts.append((fetched, complete))
    )
    assert fake.ranges() == ["bytes=4096-"]  # whole chunks of 1024 were kept
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert max(counts) == counts[-1] == (plan.missing_size, len(NEEDED))


def test_after_a_connection_that_stays_broken_only_the_rest_is_fetched(fake: FakeHub) -> None:
    fake.cuts = [0] * 6
    with pytest.raises(StartupError, match=r"^owner/tiny: .*RemoteProtocolError.*network.*complete files are kept"):
        fetch()
    fake.received.clear()
    assert files_in(fetch()) == NEEDED
    assert "model.safetensors" in fake.fetched()
    assert set(fake.fetched()) < NEEDED


def test_a_truncated_file_is_named_and_removed_and_then_fetched_again(fake: FakeHub) -> None:
    weights = fetch() / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StartupError, match=r"^owner/tiny: .*removed: model.safetensors \(100 of 16,384 bytes\)"):
        fetch()
    fake.received.clear()
    assert fetch() / "model.safetensors" == weights
    assert weights.read_bytes() == WEIGHTS
    assert fake.fetched() == ["model.safetensors"]


def test_a_file_of_another_size_than_the_metadata_says_is_refused(fake: FakeHub) -> None:
    fake.claimed = {"tokenizer.json": 99}
    with pytest.raises(StartupError, match=r"tokenizer.json \(283 of 99 bytes\)"):
        fetch()


def test_a_second_run_fetches_nothing(fake: FakeHub) -> None:
    fetch()
    fake.received.clear()
    assert hub.plan(NAME, hf_token=None).missing == {}
    fetch()
    assert [path for _, path, _ in fake.received if "/resolve/" in path] == []


def test_gated(fake: FakeHub) -> None:
    fake.token = "secret"
    with pytest.raises(StartupError, match=rf"^owner/tiny: .*gated.*{fake.endpoint}/owner/tiny.*HF_TOKEN"):
        hub.plan(NAME, hf_token=None)
    assert set(hub.plan(NAME, hf_token="secret").missing) == NEEDED


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("owner/other", None, "^owner/other: the hub has no such model.*HF_TOKEN"),
        (NAME, "v9", "^owner/tiny: the hub has no revision v9"),
        ("owner/bad name", None, "^owner/bad name: not a hub id"),
    ],
)
def test_unknown(fake: FakeHub, name: str, revision: str | None, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        hub.plan(name, hf_token=None, revision=revision)


@pytest.mark.parametrize(("status", "reason"), [(500, "answered 500"), (403, "refuses the token .*HF_TOKEN")])
def test_a_hub_that_does_not_answer_well(fake: FakeHub, status: int, reason: str) -> None:
    fake.status = status
    with pytest.raises(StartupError, match=reason):
        hub.plan(NAME, hf_token=None)


def test_no_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port for discarding; nothing listens
    with pytest.raises(StartupError, match=r"connection to http://127.0.0.1:9 failed.*ConnectError"):
        hub.plan(NAME, hf_token=None)


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match=r"^owner/tiny: HF_HUB_OFFLINE=1 forbids"):
        hub.plan(NAME, hf_token=None)


PICKLED = {path: content for path, content in FILES.items() if path != "model.safetensors"}


def test_no_safetensors(fake: FakeHub) -> None:
    fake.files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    with pytest.raises(StartupError, match=r"^owner/tiny: the repository has no model.safetensors: choose"):
        hub.plan(NAME, hf_token=None)


def test_pickles_alone_are_refused_with_what_would_convert_them(fake: FakeHub) -> None:
    fake.files = PICKLED
    here = r"^owner/tiny: the repository has only pickled weights.*\(pytorch_model.bin\), not model.safetensors: "
    with pytest.raises(StartupError, match=here + "no branch and no pull request has it; .*--convert-pickle` converts"):
        hub.plan(NAME, hf_token=None)
    with pytest.raises(StartupError, match=here + "`vecmill pull owner/tiny` looks for .*`--convert-pickle` converts"):
        hub.download(NAME, hf_token=None)
    assert set(fake.fetched()) == NEEDED - {"model.safetensors"}


def test_pull_requests_with_safetensors_are_offered_the_hub_s_own_first(fake: FakeHub) -> None:
    fake.files = PICKLED
    fake.requests = {4: ("somebody", FILES), 5: ("SFconvertbot", FILES), 6: ("another", PICKLED)}
    with pytest.raises(StartupError, match="only pickled weights") as refused:
        hub.plan(NAME, hf_token=None)
    first, second = refused.value.message.split("`vecmill pull owner/tiny --revision ")[1:]
    assert first.startswith("refs/pr/5` has it, in a pull request of SFconvertbot (the hub's conv")
    assert second.startswith("refs/pr/4` has it, in a pull request of somebody (anybody may open")
    plan = hub.plan(NAME, hf_token=None, revision="refs/pr/5")
    folder = hub.fetch(plan, hf_token=None, revision="refs/pr/5", report=lambda fetched, complete: None)
    assert (folder.name, files_in(folder)) == (f"{5:040x}", NEEDED)
    assert hub.cached(NAME, f"{5:040x}") == folder


def test_of_several_weights_only_those_that_are_read_are_fetched(fake: FakeHub) -> None:
    fake.files = FILES | {
        "model_old.safetensors": b"old",
        "model.fp16.safetensors": b"half",
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "model-00001-of-00002.safetensors": b"a part",
        "1_Dense/model.safetensors": b"of a module",
        "checkpoint-5/model.safetensors": b"earlier",
    }
    folder = fetch()
    assert files_in(folder) == NEEDED | {"model.safetensors.index.json"}
    assert hub.cached(NAME) == folder


def test_the_files_of_an_index_are_fetched_and_no_others(fake: FakeHub) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict(zip("ab", shards, strict=True))}
    fake.files = PICKLED | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        **dict.fromkeys(shards, b"a part"),
        "model-00003-of-00003.safetensors": b"of an earlier save",
    }
    wanted = (NEEDED - {"model.safetensors"}) | {*shards, "model.safetensors.index.json"}
    assert set(hub.plan(NAME, hf_token=None).sizes) == wanted
    folder = hub.download(NAME, hf_token=None)
    assert files_in(folder) == wanted
    del fake.files[shards[1]]
    with pytest.raises(StartupError, match=f"lists 2 files, and {shards[1]} is not in the repository"):
        hub.plan(NAME, hf_token=None)


def test_a_repository_of_another_format_is_named_as_what_it_is(fake: FakeHub) -> None:
    fake.files = {"README.md": b"# tiny", "tiny-q4_k_m.gguf": b"GGUF", "tiny-q8_0.gguf": b"GGUF"}
    message = (
        r"has only GGUF, the format of llama.cpp \(tiny-q4_k_m.gguf\).*: take the repository that it was converted"
    )
    with pytest.raises(StartupError, match=message):
        hub.plan(NAME, hf_token=None)
    with pytest.raises(StartupError, match=message):
        chosen_sources(load_settings({"embed_model": NAME}).model, torch.device("cpu"))
    assert fake.fetched() == []


def test_an_adapter_is_refused_before_its_weights_are_fetched(fake: FakeHub) -> None:
    fake.files = FILES | {"adapter_config.json": b'{"base_model_name_or_path": "owner/base"}'}
    with pytest.raises(StartupError, match="PEFT adapter"):
        hub.plan(NAME, hf_token=None)
    settings = load_settings({"embed_model": NAME}).model
    with pytest.raises(StartupError, match=r"changes the weights of owner/base; .*merge_and_unload"):
        chosen_sources(settings, torch.device("cpu"))
    assert "model.safetensors" not in fake.fetched()


def test_a_full_disk_is_refused(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hub.plan(NAME, hf_token=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.missing_size))
    hub.require_space(plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.missing_size - 1))
    with pytest.raises(StartupError, match=r"16.7 kB are missing and 16.7 kB are free in .*HF_HOME"):
        hub.require_space(plan)


def test_a_cache_that_cannot_be_written_is_named(fake: FakeHub, tmp_path: Path) -> None:
    plan = hub.plan(NAME, hf_token=None)
    (tmp_path / "models--owner--tiny").write_text("a file where the folder would be")
    with pytest.raises(StartupError, match=r"models--owner--tiny.* cannot be written \(Not a directory\).*HF_HOME"):
        hub.fetch(plan, hf_token=None, revision=None, report=lambda fetched, complete: None)


def test_a_complete_model_is_served_without_asking_the_hub(fake: FakeHub) -> None:
    folder = hub.download(NAME, hf_token=None)
    assert files_in(folder) == NEEDED
    fake.received.clear()
    assert hub.download(NAME, hf_token=None) == folder
    assert hub.download(NAME, hf_token=None, revision=COMMIT) == folder
    assert fake.received == []


def test_an_incomplete_model_is_completed_before_it_is_served(fake: FakeHub) -> None:
    weights = hub.download(NAME, hf_token=None) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    fake.received.clear()
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
    fake.files["config.json"] = b'{"model_type": "mamba", "max_position_embeddings": 4096}'
    settings = load_settings({"embed_model": NAME}).model
    with pytest.raises(StartupError, match=r"EMBED_MODEL=owner/tiny: model_type 'mamba' is not supported; supported: "):
        chosen_sources(settings, torch.device("cpu"))
    assert "model.safetensors" not in fake.fetched()
    assert "config.json" in fake.fetched()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"position_embedding_type": "alibi"}, r"`position_embedding_type`: \"alibi\"; supported: \"absolute\""),
        ({"auto_map": {"AutoModel": "jinaai/x--modeling_bert.JinaBertModel"}}, "no remote code is run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config`"),
        ({"surprise": 1}, "the key `surprise`"),
    ],
)
def test_a_key_that_is_not_implemented_is_refused_before_the_weights_are_fetched(
    fake: FakeHub, keys: dict[str, object], reason: str
) -> None:
    fake.files["config.json"] = json.dumps({"model_type": "bert", "max_position_embeddings": 512, **keys}).encode()
    with pytest.raises(StartupError, match=rf"^EMBED_MODEL=owner/tiny: config.json has .*{reason}"):
        chosen_sources(load_settings({"embed_model": NAME}).model, torch.device("cpu"))
    assert "model.safetensors" not in fake.fetched()


def test_a_module_that_is_not_served_is_refused_before_the_weights_are_fetched(fake: FakeHub) -> None:
    fake.files["config.json"] = SUPPORTED
    fake.files["modules.json"] = json.dumps([{"type": "custom_st.Transformer", "path": "", "name": "0"}]).encode()
    with pytest.raises(
        StartupError, match=r"^EMBED_MODEL=owner/tiny: modules.json has the class custom_st.Transformer"
    ):
        chosen_sources(load_settings({"embed_model": NAME}).model, torch.device("cpu"))
    assert "model.safetensors" not in fake.fetched()


SUPPORTED = b'{"model_type": "bert", "max_position_embeddings": 512}'


def test_a_revision_is_pinned_for_its_model(fake: FakeHub) -> None:
    fake.files["config.json"] = SUPPORTED
    settings = load_settings({"embed_model": f"auto,{NAME}", "revision": f"{NAME}={COMMIT}"}).model
    _, source = chosen_sources(settings, torch.device("cpu"))
    assert (source.id, source.folder.name) == (NAME, COMMIT)
    assert any(f"/revision/{COMMIT}" in path or f"/{COMMIT}/" in path for _, path, _ in fake.received)
    unknown = load_settings({"embed_model": NAME, "revision": "nope"}).model
    with pytest.raises(StartupError, match=r"^EMBED_MODEL=owner/tiny: "):
        chosen_sources(unknown, torch.device("cpu"))


def test_auto_on_a_gpu_is_the_default_that_the_hub_gives(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.files["config.json"] = SUPPORTED
    monkeypatch.setattr(loader, "GPU_DEFAULTS", {Task.EMBED: NAME, Task.RERANK: "owner/absent"})
    messages: list[str] = []
    [embedder] = chosen_sources(load_settings().model, torch.device("cuda"), messages.append)
    assert embedder.id == NAME
    assert messages[-1] == "fetching owner/tiny: 0.0 GB, 4 files complete"


def test_auto_on_a_gpu_without_its_default_is_the_bundled_model_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # and HF_HUB_OFFLINE, as all tests have it
    [embedder] = chosen_sources(load_settings().model, torch.device("cuda"))
    assert embedder.id == "sentence-transformers/all-MiniLM-L6-v2"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "vecmill pull Qwen/Qwen3-Embedding-4B" in warnings[0]
    assert "ranked by cosine" in warnings[1]


def test_auto_on_a_cpu_is_the_bundled_model_and_no_reranker() -> None:
    [embedder] = chosen_sources(load_settings().model, torch.device("cpu"))
    assert embedder.id == "sentence-transformers/all-MiniLM-L6-v2"


def test_the_cache_stands_before_the_bundled_files(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server, "NAME", BUNDLED_ID)
    plan = hub.plan(BUNDLED_ID, hf_token=None)
    assert find(BUNDLED_ID) == find("auto")  # nothing is there yet
    folder = hub.fetch(plan, hf_token=None, revision=None, report=lambda fetched, complete: None)
    assert find(BUNDLED_ID).folder == folder != find("auto").folder
