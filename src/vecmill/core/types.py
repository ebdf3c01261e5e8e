"""Requests and results, independent of any dialect, and the words that all rooms share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]  # (n_tokens,)
Vector = NDArray[np.float32]  # (dimensions,)
Matrix = NDArray[np.float32]  # (n_inputs, dimensions)
Scores = NDArray[np.float64]  # (n_documents,)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prefix:
    """Leading tokens that rows of one request have in common and that are computed once. Compared by identity."""

    token_ids: TokenIds

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One input of a forward pass: token ids, special tokens included, and what a family needs to know of them."""

    token_ids: TokenIds
    """What follows `prefix`; at least one."""
    prefix: Prefix | None = None
    """For causal models only."""
    unpooled: int = 0
    """Leading tokens that are attended to but not pooled: those of a prompt that the pooling leaves out."""
    second_text: int | None = None
    """Where the second text of a pair begins, for models with token types (BERT)."""
    adapter: int | None = None
    """Which of the model's adapters it is run with; None: none of them."""

    def __len__(self) -> int:
        """Tokens, those of the prefix included."""
        return len(self.token_ids) + (len(self.prefix) if self.prefix else 0)


PromptSource = Literal["files", "card"]
"""Where a model's prompts are from: its own files, or its card, which a checkpoint of that name does not repeat."""


class Task(StrEnum):
    """What a model does."""

    EMBED = "embed"
    RERANK = "rerank"


INSTRUCTION_PLACE = "{instruction}"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model is, as /v1/models, /health and the start log report it; of one that was never loaded, what its files
    say it will be."""

    id: str
    """Unique within a task: one folder may embed and rerank."""
    task: Task
    family: str
    revision: str
    """Commit of the hub's snapshot, else a hash of everything that was read (first 12 hex digits): for people."""
    fingerprint: str
    """A hash of everything that was read of the checkpoint, the hub's snapshots included."""
    dimensions: int | None
    """Of a vector; None for a reranker."""
    supported_dimensions: Sequence[int]
    """What `dimensions` may be: the native size, and less where the model is trained for it (Matryoshka)."""
    max_model_len: int
    """Tokens per input, special tokens included."""
    vocab_size: int
    """Rows of the token embedding; every token id must be below it."""
    pooling: str | None
    """None for a reranker."""
    dtype: str
    dtype_reason: str
    device: str
    weight_bytes: int
    """Not counting weights that another model had loaded already."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    adapters: Sequence[str] = ()
    """Tasks for which the model has weights of their own, by the names in its files (jina-embeddings-v3); a row's
    `adapter` is an index in it."""
    default_prompt_name: str | None = None
    """Name of the prompt for texts whose request names neither prompt nor role; None: such texts get no prompt."""
    prompts_from: PromptSource | None = None
    """None: it has no prompts."""
    instruction_template: str | None = None
    """Where a request's `instruction` goes, as INSTRUCTION_PLACE; None: it is put before the text as it is."""
    similarity: str = "cosine"
    """How the model's vectors are compared: `cosine`, `dot`, or minus a distance, `euclidean` or `manhattan`."""
    unit_vectors: bool = False
    """Whether the model's own files make vectors of length 1, and it is those that are compared."""
    layer_norm_before_slice: bool = False
    """Whether fewer dimensions are cut from the layer-normed vector (nomic-embed)."""
    aliases: Sequence[str] = ()
    license: str | None = None
    """As its README.md has it; None where that is not there or does not say."""
    numerics: str | None = None
    """With DETERMINISTIC=true: all that a vector's bits depend on beside the model and the text. None without: they
    depend on the rest of the batch, too."""

    @property
    def key(self) -> str:
        """What scheduler and engine call the model: its task and its id, with a colon between them."""
        return f"{self.task.value}:{self.id}"

    @property
    def names(self) -> tuple[str, ...]:
        """All that requests may call it."""
        return (self.id, *self.aliases)


class Lane(StrEnum):
    """Who goes first: somebody who waits for an answer, or work that only has to get done."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class Scope(StrEnum):
    """What the holder of an API key may do."""

    USE = "use"
    """Ask for work, and see and change what the key made: jobs, files, batches."""
    ADMIN = "admin"
    """See and change what every key made, and what concerns everyone: `DELETE /cache`, the cache's counts, which
    models are loaded."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The most that one key may have in progress; None: no limit but the server's."""

    requests: int | None = None
    tokens: int | None = None
    jobs: int | None = None
    """Not ended yet."""


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Viewer:
    """Whose things a request may see and change."""

    owner: str | None = None
    """What the records of this key's things say; None: there are no keys."""
    everything: bool = False
    limits: KeyLimits = NO_LIMITS

    def sees(self, owner: str | None) -> bool:
        """Whether something is the viewer's. What has no owner was made without keys, or by an earlier version."""
        return self.everything or owner == self.owner


EVERYONE = Viewer(everything=True)
"""Whoever asks from within the server."""


class CacheControl(StrEnum):
    """What a request says of kept vectors, in HTTP's words."""

    ANY = ""
    NO_CACHE = "no-cache"
    """Compute anew, and keep the result."""
    NO_STORE = "no-store"
    """Neither look up nor keep."""


class Outcome(StrEnum):
    """How an inference request ended."""

    OK = "ok"
    REFUSED = "refused"
    """The request cannot be answered as it is: a mistake in it, or an unknown model."""
    OVERLOADED = "overloaded"
    """There was no room for it."""
    TIMEOUT = "timeout"
    """Its deadline passed."""
    UNAVAILABLE = "unavailable"
    """The server is loading, stopping, or its device has failed."""
    CANCELLED = "cancelled"
    """The client left."""
    ERROR = "error"
    """A fault of the server."""


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One inference request: who asked, for what, how long each stage took, and how it ended. Durations in seconds.

    It is made when the request reaches the models and filled in as the request goes on. One that fails holds what was
    known by then. A batch makes one for each group of lines that run together.
    """

    operation: str
    """`embed` or `rerank`."""
    dialect: str = ""
    """By its name in `http/dialects`; `batch` for lines of a batch."""
    key: str | None = None
    """The name of the API key."""
    client: str = ""
    """The address."""
    job: str | None = None
    """The indexing job, or the batch, that it belongs to."""
    request_id: str = ""
    texts: int = 0
    model: str = ""
    """Empty where none was found."""
    dimensions: int | None = None
    """Of the vectors that are asked for."""
    lane: Lane | None = None
    """The lane expected from its size, until the tokens are counted; None where it was not reached."""
    tokens: int = 0
    truncated: int = 0
    """Texts that were cut."""
    cached: int = 0
    """Texts that were not run, and their tokens."""
    cached_tokens: int = 0
    arrived: float = 0.0
    """By `perf_counter`."""
    admission: float = 0.0
    """From arrival to when there was room for it; a part of `queue`."""
    tokenize: float = 0.0
    queue: float = 0.0
    """Waiting for room, and for its first batch to start."""
    forward: float = 0.0
    """From the start of its first batch to the end of its last."""
    total: float = 0.0
    """From arrival to when its result was ready, or it failed. The body is read before and encoded after it."""
    waited: bool = False
    """Whether other work was ahead of it."""
    owner: str | None = None
    """The key, as the records of its jobs name it."""
    outcome: Outcome = Outcome.OK
    at: float = field(default_factory=monotonic)
    """When it ended, by `monotonic`."""

    @property
    def overhead(self) -> float:
        """What is neither queue nor device: tokenizing, finishing the vectors."""
        return max(0.0, self.total - self.queue - self.forward)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One forward pass, once it is over."""

    model: str
    """By the scheduler's key, `ModelCard.key`."""
    lane: Lane
    """Of the batch; an interactive one may hold bulk as well."""
    rows: int
    tokens: int
    fill: float
    """Tokens as a share of the most that a pass of this model may hold; above 1 for one text that is longer."""
    seconds: float
    """On the device; of one that failed, from when it was handed to the device's thread."""
    splits: int = 0
    """How often it was halved for lack of memory."""
    failed: bool = False
    representative: bool = True
    """Whether its seconds are what a pass of so many tokens takes: not where rows shared a prefix, which may have been
    computed before, nor where passes of both lanes ran at once on the device."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how urgently."""

    client: str = ""
    """What takes turns with other clients: a key and an address."""
    owner: str | None = None
    """The key that it came with; None: there are no keys."""
    job_id: str | None = None
    """The indexing job, or the batch, that it belongs to: a client's jobs take turns in what that client gets."""
    lane: Lane | None = None
    """None: by the request's size and kind."""
    timeout: float | None = None
    """Seconds after which the answer is of no use; None leaves it to REQUEST_TIMEOUT."""
    began: float | None = None
    """When the first byte of its request came, by `monotonic`: `timeout` counts from then. None: it counts from when
    the texts are handed to the models."""
    cache_control: CacheControl = CacheControl.ANY
    keep_alive: float | None = None
    """Seconds that the model is to stay loaded after the answer, `inf` for ever; None leaves it as it is."""
    may_unload: bool = True
    """Whether `keep_alive` may be shorter than UNLOAD_AFTER: with several keys, that is for the scope `admin`."""
    dialect: str = ""
    """The name of the dialect that it speaks."""
    request_id: str = ""
    records: list[RequestRecord] | None = field(default=None, compare=False, repr=False)
    """Where the record of the request is left for whoever answers it."""

    @property
    def address(self) -> str:
        """The client's address alone."""
        return self.client.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one request spent in each stage.

    `queue` ends when its first batch starts; `forward` is from there to the end of its last batch.
    """

    tokenize: float
    queue: float
    forward: float


@dataclass(frozen=True, slots=True)
class PromptChoice:
    """How a request says what its texts are; nothing said is the model's default prompt, if it has one."""

    is_query: bool | None = None
    prompt_name: str | None = None
    """One of the model's own prompts."""
    task: str | None = None
    """As `prompt_name`, but no prompt where the model has none of that name."""
    instruction: str | None = None
    """The task in the client's own words, in place of the model's default."""
    use: str | None = field(default=None, compare=False)
    """The request's own word for what its texts are for, where it has one: what a model with adapters goes by."""


class Side(StrEnum):
    """An end of a text."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Truncation:
    """What happens to a text that is too long. Special tokens and the prompt stay, whichever side is cut."""

    allowed: bool | None = None
    """None leaves it to AUTO_TRUNCATE."""
    side: Side | None = None
    """None: what the model's tokenizer cuts, the prompt included where that is the beginning."""
    max_tokens: int | None = None
    """Fewer than the model's own limit, special tokens included."""


class TokenVocabulary(StrEnum):
    """Whose token ids clients may send in place of texts."""

    MODEL = "model"
    CL100K = "cl100k"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts, or ready token ids, to be turned into vectors."""

    inputs: Sequence[str] | Sequence[Sequence[int]]
    model: str | None = None
    prompt: PromptChoice = PromptChoice()
    truncation: Truncation = Truncation()
    token_vocabulary: TokenVocabulary | None = None
    """Whose ids the inputs are; None leaves it to TOKEN_IDS."""
    dimensions: int | None = None
    normalize: bool = True
    param: str = "input"
    """What this dialect calls the inputs, for error texts."""
    caller: Caller = Caller()


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Vectors in input order."""

    embeddings: Matrix
    model: str
    prompt_tokens: int
    truncated: tuple[int, ...]
    """Indexes of the inputs that were cut."""
    timings: Timings
    tokens: tuple[int, ...] = ()
    """Of each input."""
    cached: tuple[int, ...] = ()
    """Indexes of the inputs whose vectors were kept from before."""

    @property
    def cached_tokens(self) -> int:
        """Tokens that did not have to be computed."""
        return sum(self.tokens[index] for index in self.cached)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Documents to score against one query, or each against a query of its own."""

    queries: Sequence[str]
    """One for all documents, or one for each; equal ones that follow each other are tokenized once."""
    documents: Sequence[str]
    model: str | None = None
    truncation: Truncation = Truncation()
    max_tokens_per_query: int | None = None
    max_tokens_per_document: int | None = None
    """Longer queries and documents are cut, even where truncation is not allowed; special tokens do not count."""
    instruction: str | None = None
    raw_scores: bool = False
    param: str = "documents"
    """What this dialect calls the documents, for error texts."""
    query_param: str = "query"
    caller: Caller = Caller()


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Scores in the documents' order: in 0..1, or the model's own scale where raw scores were asked for."""

    scores: Scores
    model: str
    method: str
    """`cross_encoder`: a reranker ranked; else the similarity of an embedding model's vectors, such as `cosine`."""
    prompt_tokens: int
    truncated: tuple[int, ...]
    timings: Timings
    cached_tokens: int = 0
    """Tokens that did not have to be computed: an embedding model ranked, and had read them before."""


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """Texts whose tokens are to be shown."""

    texts: Sequence[str]
    model: str | None = None
    prompt: PromptChoice = PromptChoice()
    special_tokens: bool = True
    param: str = "inputs"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a text."""

    id: int
    token: str
    """As the vocabulary has it."""
    text: str
    """As the text has it; of a special token its name."""
    special: bool
    start: int | None
    """Where it begins and ends in the text (after the prompt is put before it), in characters; None if special."""
    stop: int | None


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """The pieces of each text, uncut."""

    pieces: Sequence[Sequence[Piece]]
    card: ModelCard


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """Token ids of the model's vocabulary that are to be turned into texts."""

    inputs: Sequence[Sequence[int]]
    model: str | None = None
    skip_special_tokens: bool = True
    param: str = "ids"
