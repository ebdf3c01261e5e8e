"""Where a setting comes from, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vecmill.config import load_settings, misspelt
from vecmill.config.reference import env_example
from vecmill.config.settings import GROUPS
from vecmill.core.errors import StartupError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `.env` in the working directory."""
    monkeypatch.chdir(tmp_path)
    for group in GROUPS:
        monkeypatch.setitem(group.model_config, "env_file", ".env")
    return tmp_path / ".env"


def test_flag_over_environment_over_dotenv_over_default(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().http.port == 8080
    dotenv.write_text("PORT=1001\nMAX_BATCH_SIZE=17\n")
    assert load_settings().http.port == 1001
    monkeypatch.setenv("PORT", "1002")
    assert load_settings().http.port == 1002
    assert load_settings({"port": 1003}).http.port == 1003
    assert load_settings({"port": None}).http.port == 1002
    assert load_settings().engine.max_batch_size == 17


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("MAX_BATCH_TOKENS", "")
    settings = load_settings()
    assert (settings.http.port, settings.engine.max_batch_tokens) == (8080, None)


def test_embed_model_is_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_MODEL", "auto, BAAI/bge-base-en-v1.5")
    assert load_settings().model.embed_model == ("auto", "BAAI/bge-base-en-v1.5")


def test_pairs_are_alias_and_model_and_revisions_name_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ALIASES", "small=auto, text-embedding-3-small = Qwen/Qwen3-Embedding-4B")
    monkeypatch.setenv("EMBED_MODEL", "Qwen/Qwen3-Embedding-4B,nvidia/NV-Embed-v2")
    monkeypatch.setenv("REVISION", "nvidia/NV-Embed-v2=3fa5965")
    models = load_settings().model
    assert dict(models.model_aliases) == {"small": "auto", "text-embedding-3-small": "Qwen/Qwen3-Embedding-4B"}
    assert models.revision_of("nvidia/NV-Embed-v2") == "3fa5965"
    assert models.revision_of("Qwen/Qwen3-Embedding-4B") is None
    alone = load_settings({"embed_model": "nvidia/NV-Embed-v2", "revision": "3fa5965"}).model
    assert alone.revision_of("nvidia/NV-Embed-v2") == "3fa5965"


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert load_settings({"device": device}).engine.device == device


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 99999}, ["PORT=99999", "65535"]),
        ({"port": "http"}, ["PORT='http'", "integer"]),
        ({"device": "gpu"}, ["DEVICE='gpu'", "cuda:N"]),
        ({"device": "cuda:0,cuda:1"}, ["DEVICE='cuda:0,cuda:1'", "one device", "serve run vecmill.cluster:build"]),
        ({"device": "cpu,cpu"}, ["DEVICE='cpu,cpu'", "one device"]),
        ({"dtype": "int8"}, ["DTYPE='int8'", "bfloat16"]),
        ({"model_aliases": "small"}, ["MODEL_ALIASES='small'", "alias=model"]),
        ({"rerank_model": "none,BAAI/bge-reranker-base"}, ["RERANK_MODEL", "stands alone"]),
        ({"embed_model": "none"}, ["EMBED_MODEL", "for rerankers only"]),
        ({"embed_model": "a/b,c/d", "revision": "abc"}, ["REVISION=abc", "owner/name=abc"]),
        ({"replica": "x" * 129}, ["REPLICA", "1 to 128 printable"]),
        ({"replica": "two\nlines"}, ["REPLICA='two\\nlines'", "1 to 128 printable"]),
        ({"replica": "kürzlich"}, ["REPLICA", "ASCII"]),
        ({"replica_url": "spark:8080"}, ["REPLICA_URL", "http://host:port"]),
        ({"replica_url": "http://user:password@spark:8080"}, ["REPLICA_URL", "no password"]),
        ({"log_format": "xml"}, ["LOG_FORMAT", "json"]),
        ({"strict_model": "perhaps"}, ["STRICT_MODEL", "bool"]),
        ({"embed_model": " , "}, ["EMBED_MODEL", "names no model"]),
        ({"embed_model": "a,a"}, ["EMBED_MODEL", "twice"]),
        (
            {"max_client_batch_size": 100, "max_queued_tokens": 50},
            ["MAX_CLIENT_BATCH_SIZE=100", "MAX_QUEUED_TOKENS=50"],
        ),
        ({"max_batch_size": 64, "max_batch_tokens": 32}, ["MAX_BATCH_SIZE=64", "MAX_BATCH_TOKENS=32"]),
        ({"max_model_len": 512, "max_batch_tokens": 256}, ["MAX_MODEL_LEN=512", "MAX_BATCH_TOKENS=256"]),
        ({"drain_seconds": 30}, ["DRAIN_SECONDS=30", "SHUTDOWN_SECONDS=30"]),
        ({"device": "cpu", "dtype": "fp8"}, ["DTYPE=fp8", "DEVICE=cpu", "8.9"]),
        ({"device": "mps", "dtype": "fp8"}, ["DTYPE=fp8", "DEVICE=mps"]),
        ({"device": "cpu", "dtype": "float16"}, ["DTYPE=float16", "DEVICE=cpu"]),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_knobs(flags: dict[str, object], named: list[str]) -> None:
    with pytest.raises(StartupError) as refused:
        load_settings(flags)
    assert all(name in refused.value.message for name in named), refused.value.message
    assert "\n" not in refused.value.message


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert "verysecret" not in repr(load_settings())


def test_env_example_is_written_from_the_declarations() -> None:
    assert (ROOT / ".env.example").read_text("utf-8") == env_example()
    for group in GROUPS:
        for name in group.model_fields:
            assert f"#{name.upper()}=" in env_example()


def test_env_example_uncommented_gives_the_defaults(dotenv: Path) -> None:
    lines = [line[1:] for line in env_example().splitlines() if line.startswith("#") and not line.startswith("# ")]
    dotenv.write_text("\n".join(lines))
    assert load_settings() == load_settings()
    loaded = load_settings()
    dotenv.unlink()
    assert loaded == load_settings()


def test_a_variable_close_to_a_setting_is_named(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert misspelt() == []
    monkeypatch.setenv("EMBED_MODLE", "a-secret")
    monkeypatch.setenv("VLLM_MEMORY_FRACTION", "0.5")  # another program's
    monkeypatch.setenv("API_KE" + "Y" * 1000, "")
    dotenv.write_text("max-batch-tokens=3\nMAX_BATCH_TOKEN=3\nPORT=1\nMODEL_PATH=x\n")
    assert misspelt() == [
        "EMBED_MODLE is no setting: is EMBED_MODEL meant?",
        "MAX_BATCH_TOKEN is no setting: is MAX_BATCH_TOKENS meant?",
    ]
    other = dotenv.with_name("other.env")
    other.write_text("DTPYE=float32\n")
    assert "DTPYE is no setting: is DTYPE meant?" in misspelt(other)
