"""Models of the families, loaded in float32 on the CPU and run without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Row, Task, TokenIds
from vecmill.inference.text_tokenizer import TextTokenizer
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models import attention_products, networks
from vecmill.models.checkpoint import Checkpoint, Source, read
from vecmill.models.cpu_kernels import cpu_kernels, torch_threads
from vecmill.models.networks import Model
from vecmill.models.packing import Attention, pack
from vecmill.models.tokenizer_files import read_file
from vecmill.models.weights import Target

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
LoadedModel = tuple[Checkpoint, Model]


def load_model(folder: Path, task: Task = Task.EMBED, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A checkpoint and the model that runs it."""
    checkpoint = read(Source(folder.name, folder, task))
    return checkpoint, networks.load_model(checkpoint, Target(dtype, CPU))


ON_CPU = (Attention.SDPA, Attention.PRODUCTS)


@torch.inference_mode()
def run(model: Model, rows: Sequence[Row], attention: Attention = Attention.SDPA) -> NDArray[np.float32]:
    """(n, width) as the model gives it, in the order of the rows."""
    packed = pack(rows, CPU, attention=attention)
    answers = model.forward(packed).numpy()
    in_order = np.empty_like(answers)
    in_order[list(packed.order)] = answers
    return in_order


@contextmanager
def compiled_steps(wanted: bool) -> Iterator[None]:
    """In one thread, as most passes have; the steps between the products of attention compiled, or torch's."""
    if wanted and cpu_kernels() is None:
        pytest.skip("there are no compiled steps on this machine")
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        if not wanted:
            patch.setattr(attention_products, "cpu_kernels", lambda: None)
        yield


def in_every_way(model: Model, rows: Sequence[Row]) -> Iterator[NDArray[np.float32]]:
    """What a model in bfloat16 gives, with each of the ways to compute attention."""
    yield run(model, rows)
    for compiled in {False, cpu_kernels() is not None}:
        with compiled_steps(compiled):
            yield run(model, rows, Attention.PRODUCTS)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1, but a row of zeros as it is: a padding token's embedding may be all there is of a text."""
    normalized: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return normalized


def bfloat16_cosines(folder: Path) -> NDArray[np.float32]:
    """Cosines of rows of random tokens, 1 to 100 tokens long, between an embedder in bfloat16, with each of the ways to
    compute attention, and in float32."""
    exact, rounded = (load_model(folder, dtype=dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    random = np.random.default_rng(0)
    rows = [Row(random.integers(0, exact.vocab_size, length).astype(np.int32)) for length in range(1, 101, 9)]
    wanted = unit(run(exact, rows))
    return np.stack([np.sum(wanted * unit(given), axis=1) for given in in_every_way(rounded, rows)])


def ids(*values: int) -> TokenIds:
    """Token ids as a row holds them."""
    return np.array(values, dtype=np.int32)


@contextmanager
def text_tokenizer(loaded: LoadedModel, max_model_len: int) -> Iterator[TextTokenizer]:
    """The tokenizer of an embedding model, cut at another length."""
    checkpoint, model = loaded
    with WorkerThreads(1) as threads:
        pool = TokenizerPool(read_file(checkpoint.tokenizer_file), model.vocab_size, max_model_len, threads)
        yield TextTokenizer(pool, checkpoint.text_format, max_model_len, model.vocab_size)
