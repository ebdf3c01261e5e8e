"""The settings themselves. A field's name in capitals is its environment variable, in kebab-case its flag."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_network
from math import inf
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vecmill.config.key_file import KEY, KeyEntry, check_length, check_unique, key_entry
from vecmill.core.clock import parse_duration
from vecmill.core.types import TokenVocabulary

Pairs = tuple[tuple[str, str], ...]

# Scheme, host and port, of which the host, its first label or the port may be `*`.
ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(\*|(\*\.)?[a-z0-9._~!$&'()=;%-]+|\[[0-9a-f:.]+\])(:([0-9]{1,5}|\*))?", re.ASCII
)
REPLICA_NAME = re.compile(r"[!-~]([ -~]{0,126}[!-~])?", re.ASCII)
PRINTABLE = KEY  # ASCII without spaces, as an address or a header takes it


class SettingsGroup(BaseSettings):
    """One room's settings: keyword over environment over `.env` over default."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    title: ClassVar[str]


def _split_commas(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _origin(value: str) -> str:
    """An origin as browsers write it, or a pattern of origins."""
    origin = value.lower()
    if origin != "*" and not ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{value[:100]!r} is no origin: write `https://example.org`, without a path and a `/` at its end, "
            f"`https://*.example.org`, `http://localhost:*`, `chrome-extension://*`, or `*` alone"
        )
    scheme = origin.partition(":")[0]
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(scheme, " "))


def _absolute_path(value: Path) -> Path:
    try:
        return value.expanduser().absolute()
    except RuntimeError:
        raise ValueError("`~` stands for the home of a user that this machine does not know") from None


def _base_url(value: str, cure: str = "") -> str:
    """An http(s) address without the `/v1` that OpenAI's clients end it with. `cure`: where a password belongs."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # a port that is none, a bracket that is not closed
        usable = False
    if not usable or not PRINTABLE.fullmatch(value):
        raise ValueError("must be an address of the form http://host:port")
    if "@" in value:
        raise ValueError(f"must hold no user name and no password{cure}")
    if "?" in value or "#" in value:
        raise ValueError("must end with the path: no `?`, no `#`")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


class ModelSettings(SettingsGroup):
    """What is served."""

    title: ClassVar[str] = "Models"

    embed_model: Annotated[tuple[str, ...], NoDecode] = Field(
        ("auto",),
        description="Embedding models, comma-separated, the first is the default: folders in the hub's layout, hub "
        "ids, or `auto`: Qwen/Qwen3-Embedding-4B on a CUDA GPU where it is cached or the hub is reachable, else the "
        "MiniLM that the extra `bundled` installs. Its own id, all-MiniLM-L6-v2, names it too.",
    )
    rerank_model: Annotated[tuple[str, ...], NoDecode] = Field(
        ("auto",),
        description="Rerankers, comma-separated, the first is the default: folders, hub ids, `none` (documents are "
        "ranked by the cosine of the embedding model), or `auto`: Qwen/Qwen3-Reranker-4B on a CUDA GPU where it is "
        "cached or the hub is reachable, else `none`.",
    )
    model_aliases: Annotated[Pairs, NoDecode] = Field(
        (), description="Other names for models: `alias=model`, comma-separated. Read again on SIGHUP."
    )
    revision: Annotated[Pairs, NoDecode] = Field(
        (),
        description="Commit, tag or branch of hub models: `owner/name=revision`, comma-separated, or the revision "
        "alone where one model is named. Default: the hub's main branch.",
    )
    query_instruction: str | None = Field(
        None,
        description="The task that queries are for, in place of the default one in each model's query prompt; for "
        "models whose query prompt has no place for a task, the whole prompt. A request's `instruction` wins.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto",
        description="Type of the weights. `auto`: bfloat16 on a GPU; on a CPU the faster of bfloat16 and float32, "
        "measured at warm-up. `fp8`: linear layers in float8, all else in bfloat16, on NVIDIA cards from compute "
        "capability 8.9 on; a model whose answers it moves too far is refused. Pooling, scores and normalisation are "
        "always float32.",
    )
    deterministic: bool = Field(
        False,
        description="The same bits for a text, or a pair, whatever else is in its batch: each runs in a pass of "
        "its own, with fixed threads and kernels, without CUDA graphs and torch.compile, and is cached exactly, apart "
        "from other vectors. `DTYPE=auto` on a CPU is then float32. It costs throughput: see docs/models.md.",
    )
    max_model_len: int | None = Field(
        None,
        ge=8,
        description="Tokens per input, special tokens included. Default: what each model's own files say; it can only "
        "be lowered.",
    )
    hf_token: SecretStr | None = Field(None, description="Token for gated models on the hub.")
    unload_after: Annotated[tuple[tuple[str, float], ...], NoDecode] = Field(
        (),
        description="How long a model stays in memory after its last request: `10m`, `1h30m`, seconds as a number, -1 "
        "for ever; or `model=10m`, comma-separated, each for its model. It is loaded again by the next request that "
        "names it. Ollama's `keep_alive` in a request takes its place. Default: for ever.",
    )
    pinned_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models, comma-separated, that are never unloaded: not by UNLOAD_AFTER or `keep_alive`, not to "
        "make room for another, not by POST /models/unload.",
    )
    max_loaded_gb: float | None = Field(
        None,
        gt=0,
        description="Gigabytes of weights in memory, at most. What does not fit at the start is loaded when a request "
        "names it, and the least recently used model goes first. Default: all models are loaded.",
    )
    sleep_gb: float = Field(
        0,
        ge=0,
        description="Gigabytes of the machine's memory in which unloaded models sleep, at most: the next request that "
        "names one waits for a copy to the card and not for its files. On a card with memory of its own alone; "
        "whoever sleeps longest goes first. POST /models/unload ends a model's sleep. 0: models are unloaded.",
    )
    ready_when: Literal["all", "first"] = Field(
        "all",
        description="When a start with several models is over, for /ready, /health and systemd: once `all` are loaded, "
        "or the `first` one. Either way each answers requests as soon as it is loaded.",
    )
    load_timeout: float = Field(
        120,
        gt=0,
        le=3600,
        description="Seconds that a request waits for its model to be loaded, at the most, before it is refused with "
        "503; loading goes on.",
    )

    @field_validator("embed_model", "rerank_model", "pinned_models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value) if isinstance(value, str) else value

    @field_validator("model_aliases", "revision", mode="before")
    @classmethod
    def _split_pairs(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        pairs = [tuple(part.strip() for part in entry.rpartition("=")[::2]) for entry in _split_commas(value)]
        if info.field_name == "model_aliases" and not all(alias and name for alias, name in pairs):
            raise ValueError("must be `alias=model`, comma-separated")
        return tuple(pairs)

    @field_validator("unload_after", mode="before")
    @classmethod
    def _split_durations(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [entry.rpartition("=")[::2] for entry in _split_commas(value)]
        durations = tuple((name.strip(), parse_duration(duration)) for name, duration in pairs)
        if len({name for name, _ in durations}) != len(durations):
            raise ValueError("says two durations of one model")
        return durations

    @field_validator("embed_model", "rerank_model")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no model; use `auto`, a folder or a hub id")
        if len(set(value)) != len(value):
            raise ValueError("names a model twice")
        if "none" in value and (info.field_name == "embed_model" or len(value) > 1):
            raise ValueError("`none` stands alone, and for rerankers only")
        return value

    def revision_of(self, name: str) -> str | None:
        """The revision pinned for a hub model."""
        pinned = dict(self.revision)
        return pinned.get(name, pinned.get(""))

    def unload_after_of(self, names: Iterable[str]) -> float:
        """Seconds that the model of these names stays loaded without a request; `inf`: for ever."""
        durations = dict(self.unload_after)
        return next((durations[name] for name in names if name in durations), durations.get("", inf))


class EngineSettings(SettingsGroup):
    """The device and how much it is given at once."""

    title: ClassVar[str] = "Device"

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto` (CUDA, else MPS, else CPU), `cuda`, `cuda:N`, `mps` or `cpu`.",
    )

    max_batch_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Rows per forward pass, at most. Default: one for each 32 tokens that a forward pass may have on a "
        "CPU (128), for each 16 on a GPU (1024 without MAX_BATCH_TOKENS).",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=8,
        le=1_048_576,
        description="Tokens per forward pass, at most; an input longer than this runs alone. Default: 16384 on a GPU, "
        "4096 on a CPU, more for a model that takes no 5 ms for them. Below it the budget is measured at warm-up.",
    )
    max_batch_ms: float = Field(
        100,
        gt=0,
        description="Milliseconds per forward pass, at most: what a search may have to wait for. Warm-up turns it into "
        "tokens; an input that takes longer by itself still runs, alone.",
    )
    torch_compile: Literal["auto", "true", "false"] = Field(
        "auto",
        description="torch.compile of the models' layers. `auto`: measured against eager at warm-up, the faster is "
        "kept; where it cannot be compiled, eager with a warning. On a CPU eager: compiled layers are no faster there.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Forward passes captured as CUDA graphs at warm-up, up to the number of tokens at which that is "
        "no longer faster; false: every kernel is launched by itself.",
    )
    memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the device's memory that the process may take (on a CPU: of the machine's); more is "
        "refused with 503. On a GPU that shares the machine's memory no more than is available above MEMORY_FLOOR_GB "
        "when the models load.",
    )
    memory_floor_gb: float | None = Field(
        None,
        ge=0,
        description="Gigabytes of the machine's memory that stay free: below it work is refused with 503 until there "
        "is room. Default: 4 % of the memory, at most 8.",
    )
    use_flash_attn: bool = Field(
        True,
        description="Variable-length flash attention (part of torch) on CUDA, from compute capability 8.0 on; false: "
        "SDPA, one call for each length.",
    )

    @field_validator("device", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        if isinstance(value, str) and "," in value:
            raise ValueError(
                "a server has one device; `serve run vecmill.cluster:build replicas=N` (the extra `ray`, docs/ray.md) "
                "runs one server on each of N cards behind one port"
            )
        return value


class SchedulerSettings(SettingsGroup):
    """Who goes first."""

    title: ClassVar[str] = "Scheduling"

    bulk_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the tokens that bulk work keeps while searches never end; searches go first otherwise. "
        "Up to 0.5 it is kept; above, searches still fill what the next bulk text is too long for.",
    )
    aging_seconds: float = Field(
        5,
        gt=0,
        description="Seconds at the front of its client's line after which a text goes before everything else.",
    )
    request_timeout: float = Field(
        600,
        gt=0,
        description="Seconds until a request is answered with 504 and its texts are dropped unrun. A request's "
        "`X-Request-Timeout` can only lower it.",
    )


class InferenceSettings(SettingsGroup):
    """What one request may ask for, and how much may wait."""

    title: ClassVar[str] = "Requests"

    strict_model: bool = Field(
        False,
        description="Answer 404 to every unknown `model`. Default: with one embedding model (or reranker) loaded, any "
        "name gets that one.",
    )
    allow_control_tokens: bool = Field(
        False,
        description="Read control tokens (`<|im_end|>`, `</s>`) that stand in a query or document to rerank as what "
        "they say, as the models' reference code does. Default: they are plain text, so no document can write the "
        "reranker's prompt.",
    )
    auto_truncate: bool = Field(
        True,
        description="Cut inputs longer than MAX_MODEL_LEN where the request does not say; false: refuse them with 400.",
    )
    token_ids: TokenVocabulary = Field(
        TokenVocabulary.CL100K,
        description="Whose token ids clients may send to /v1/embeddings in place of texts. `cl100k`: OpenAI's, as "
        "LangChain's OpenAIEmbeddings does by default; they are turned back into text, and ids that are not of that "
        "vocabulary are taken if they are what the model's own tokenizer gives. `model`: the model's own. `reject`: "
        "none. /embed takes the model's own.",
    )
    max_client_batch_size: int = Field(2048, ge=1, description="Inputs per request; more is a 4xx.")
    max_concurrent_requests: int = Field(
        512, ge=1, description="Requests in progress; more wait. An eighth of it is kept for searches."
    )
    max_queued_tokens: int = Field(
        2_000_000,
        ge=8,
        description="Tokens admitted and not yet answered, over all requests; more wait. An eighth of it is kept for "
        "searches.",
    )
    queue_timeout: float = Field(
        30,
        ge=0,
        le=3600,
        description="Seconds that a request waits for room, at the most, before it is refused with 503 or 429, "
        "whichever its client tries again after; 0: it is refused at once.",
    )
    tokenization_workers: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Threads that tokenize and encode answers. Default: the number of cores, at most 8.",
    )


class JobSettings(SettingsGroup):
    """Indexing jobs that clients register."""

    title: ClassVar[str] = "Jobs"

    jobs_max_active: int = Field(2, ge=1, description="Jobs active at a time; later ones queue in order.")
    job_lease_seconds: float = Field(
        300,
        gt=0,
        description="Seconds without progress, poll or tagged `/embed` after which a job is given up as failed.",
    )
    jobs_max_wait_seconds: float = Field(
        270,
        gt=0,
        description="Seconds that a job waits, at the most, before it becomes active beside the others: "
        "CodeCartographer gives up after 300.",
    )


class StateSettings(SettingsGroup):
    """What lasts beyond the process."""

    title: ClassVar[str] = "State"

    state_dir: Path = Field(
        Path("~/.local/share/vecmill"),
        validate_default=True,
        description="Folder for the cache, the jobs and the files of batches. One server at a time uses it, unless "
        "REDIS_URL is set.",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis (or Valkey) for the cache and the jobs, so that several servers share them: "
        "`redis://host:6379/0`. Needs the extra `redis`. Default: files in STATE_DIR.",
    )

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return _absolute_path(value)

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and urlsplit(value.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must be an address of the form redis://host:6379/0")
        return value


class CacheSettings(SettingsGroup):
    """Vectors that were computed before."""

    title: ClassVar[str] = "Cache"

    cache_max_bytes: int = Field(
        10_737_418_240,
        ge=0,
        description="Bytes of vectors that are kept on disk, the least recently used go first; 0: no cache. With "
        "REDIS_URL its `maxmemory` is the limit.",
    )
    cache_dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="How vectors are kept. `auto`: 16 bits for each dimension where no value of a vector of length 1 "
        "changes by more than 8e-6, else 32; `float32`: as they were computed.",
    )
    cache_across_keys: bool = Field(
        True,
        description="Answer a text that another API key has sent before with the vector that was computed then; no "
        "answer says so. false: each key has vectors of its own.",
    )
    cache_queries: bool = Field(
        True, description="Keep the vectors of queries too; false: queries are neither looked up nor kept."
    )


class BatchSettings(SettingsGroup):
    """Files of requests that the server works through by itself."""

    title: ClassVar[str] = "Batches"

    batch_dir: Path | None = Field(
        None,
        description="Folder for the files of batches that several servers share, as on NFS: each batch is run by one "
        "of them, and by another when that one dies. Needs no Redis. Default: STATE_DIR.",
    )
    batches_max_active: int = Field(4, ge=1, le=64, description="Batches in progress at a time; later ones wait.")
    batch_chunk_size: int = Field(
        512, ge=1, le=65_536, description="Lines of a batch in progress at a time: what a crash makes it do again."
    )
    max_file_bytes: int = Field(1_073_741_824, ge=1024, description="Bytes per uploaded file; more is a 413.")
    max_files_bytes: int = Field(
        107_374_182_400,
        ge=1024,
        description="Bytes of all files of batches, uploads and results; what would be more is refused until files are "
        "deleted.",
    )
    file_expires_days: float = Field(30, gt=0, le=3650, description="Days until a file is deleted.")

    @field_validator("batch_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute_path(value)


class HttpSettings(SettingsGroup):
    """The address and the limits of a request body."""

    title: ClassVar[str] = "HTTP"

    host: str = Field("127.0.0.1", description="Address to bind. 0.0.0.0 opens the server to the network.")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    replica: str | None = Field(
        None,
        description="Name of this server among its replicas, of 1 to 128 printable ASCII characters: on the dashboard, "
        "in `/health`, `/capabilities` and `vecmill_build_info`. Where it is set, also on every metric, on each line "
        "of the log and on each answer, as `X-Replica`. Default: `hostname:port`.",
    )
    replica_url: str | None = Field(
        None,
        description="Address at which others reach this server, `http://host:port`: the dashboards of its replicas, "
        "which REDIS_URL brings together, have it as a link. Default: none.",
    )
    max_body_bytes: int = Field(
        33_554_432,
        ge=1024,
        description="Bytes per request body, decompressed; more is a 413. All bodies at one time may take eight times "
        "this, those of one client half of that; a body waits 5 seconds for room, then it is a 429.",
    )
    head_timeout: float = Field(
        20,
        gt=0,
        description="Seconds within which a request's line and header fields must have come; longer is a 408.",
    )
    body_timeout: float = Field(
        20,
        gt=0,
        description="Seconds that a request's body may pause, or come with less than 500 bytes a second; longer is a "
        "408. All of it must come within REQUEST_TIMEOUT.",
    )
    idle_timeout: float = Field(
        75,
        gt=0,
        description="Seconds that a connection stays open without a request, or with an answer that its client does "
        "not take. Longer than clients keep theirs, or one would send on a connection that is just being closed.",
    )
    shutdown_seconds: int = Field(
        30,
        ge=1,
        description="Seconds that requests in progress get to finish after SIGTERM; what is not done by then is "
        "answered with 503, and the process ends at most 5 seconds later.",
    )
    drain_seconds: float = Field(
        0,
        ge=0,
        description="Seconds after SIGTERM, part of SHUTDOWN_SECONDS, in which /ready is 503 and new work is still "
        "taken: so long what balances the load may need to see it. 0: new work is refused at once.",
    )
    exit_on_failure: bool = Field(
        True,
        description="End the process with 1 when the device fails for good, so that a supervisor restarts it; false: "
        "stay, answering 503.",
    )

    @field_validator("replica")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not REPLICA_NAME.fullmatch(value):
            raise ValueError(
                "must be 1 to 128 printable characters of ASCII without a space at an end, as it goes into a header"
            )
        return value

    @field_validator("replica_url")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)


class AccessSettings(SettingsGroup):
    """Who may use the server."""

    title: ClassVar[str] = "Access"

    api_key: Annotated[tuple[KeyEntry, ...], NoDecode] = Field(
        (),
        description="Keys that requests must carry one of, as `Authorization: Bearer KEY`, `api-key` or `x-api-key`, "
        "of at least 16 characters (`vecmill keys new` makes one): comma-separated, each with a name where it is "
        "written `name:key`, and what it may after a space: `scopes=use+admin`, `requests=N` and `tokens=N` in "
        "progress, `jobs=N`. Default: none, everyone who reaches the address may use the server. /health and /ready "
        "need none. Read again on SIGHUP.",
    )
    api_key_file: Path | None = Field(
        None,
        description="File with more such keys, one a line, `key` or `name:key` and what it may; lines with `#` are "
        "comments. Read again on SIGHUP.",
    )
    admin_api_key: SecretStr | None = Field(
        None,
        description="Key with all scopes, of at least 16 characters: it sees every key's jobs, files and batches, and "
        "does what concerns everyone (`DELETE /cache`, `POST /models/load`). Default: with API_KEY only keys with "
        "`scopes=admin` may do that, without it everyone. Read again on SIGHUP.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses and networks (`10.0.0.1`, `172.16.0.0/12`) of proxies, comma-separated, whose "
        "`X-Forwarded-For` and `X-Forwarded-Proto` are believed. Default: nobody's, a client is the address that it "
        "connects from.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose web pages may call the server, comma-separated: `https://example.org`, "
        "`https://*.example.org` (what is below it), `http://localhost:*` (any port), `chrome-extension://*` (any "
        "host), or `*`. Default: only its own pages.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names that the server answers to, comma-separated, or `*`. Default: with API_KEY every name; "
        "without, only addresses, localhost, the machine's own name and others that only a local network has "
        "(`vecmill`, `spark.local`).",
    )

    @field_validator("cors_origins", "allowed_hosts", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = _split_commas(value)
        if value.strip() and not parts:
            raise ValueError("names none; leave it empty for the default")
        return parts

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ip_network(network)
            except ValueError as error:
                raise ValueError(f"must be addresses and networks, comma-separated ({error})") from None
        return value

    @field_validator("api_key_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _absolute_path(value)

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        entries = _split_commas(value)
        if value.strip() and not entries:
            # It was meant to lock the server; without a key it would be open to everyone.
            raise ValueError("holds no key; leave the setting out to open the server to everyone")
        return tuple(key_entry(entry, f"key {number}") for number, entry in enumerate(entries, 1))

    @field_validator("api_key")
    @classmethod
    def _usable(cls, value: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        check_unique(value)
        return value

    @field_validator("admin_api_key")
    @classmethod
    def _safe(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            if not KEY.fullmatch(value.get_secret_value()):
                raise ValueError("must be a key of ASCII without spaces")
            check_length(value.get_secret_value())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_origin(origin) for origin in value)


class GenerationSettings(SettingsGroup):
    """A server beside this one that generates text: vLLM, Ollama."""

    title: ClassVar[str] = "Generation"

    generation_url: str | None = Field(
        None,
        description="Address of an OpenAI-compatible server (vLLM, Ollama) to which `/v1/completions` and "
        "`/v1/chat/completions` are passed through: `http://host:port`. Default: those calls are a 404.",
    )
    generation_api_key: SecretStr | None = Field(
        None, description="Bearer token for GENERATION_URL. What clients send as theirs never goes there."
    )
    generation_timeout: float = Field(
        600, gt=0, description="Seconds without a byte from GENERATION_URL after which it is given up with 504."
    )

    @field_validator("generation_url")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value, "; the key goes into GENERATION_API_KEY")

    @field_validator("generation_api_key")
    @classmethod
    def _of_one_line(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not PRINTABLE.fullmatch(value.get_secret_value()):
            raise ValueError("must be printable ASCII without spaces, as it goes into a header")
        return value


class LogSettings(SettingsGroup):
    """The log and traces. Texts and secrets are never in them."""

    title: ClassVar[str] = "Log and traces"

    log_format: Literal["text", "json"] = Field("text", description="`text` for people, `json` for collectors.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is written; `debug` has a line for every request."
    )
    log_requests: bool = Field(
        True,
        description="A line at `info` for each request that asks for work, changes something or fails: its id, model, "
        "texts, tokens, milliseconds. Reads that succeed, as health checks, are at `debug`. false: all at `debug` but "
        "what is refused.",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="Address of an OpenTelemetry collector that takes OTLP over HTTP, `http://host:4318`: traces are "
        "sent there. Needs the extra `otel`. Default: what OTEL_EXPORTER_OTLP_ENDPOINT and OpenTelemetry's other "
        "variables say; without them none.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)
