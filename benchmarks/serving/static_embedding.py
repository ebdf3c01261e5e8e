"""Texts per second of a static embedding model (StaticEmbedding, model2vec) through the server, and in process.

Such a model is a table: next to nothing is computed, so what is measured is everything around a forward pass. Each
round sends lists of texts of 20 to 60 tokens over a few connections, in each encoding, with and without the cache; and
embeds the same texts in process: with the tokenizers library and the table alone, which is the most that the server
could reach, and with sentence-transformers. Texts are new in each round, so nothing is answered from the cache.

    python -m benchmarks.serving.static_embedding
    python -m benchmarks.serving.static_embedding --only 256 --rounds 5
    python -m benchmarks.serving.static_embedding --serve --dtype float32   # all after --serve goes to `vecmill serve`

Ends with status 1 where the server's vectors are not those of sentence-transformers.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import benchmarks.lib.threads  # noqa: F401  # before torch
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from benchmarks.lib.figures import in_turns, print_disturbance, shown, spread
from benchmarks.lib.host import describe_host, watched
from benchmarks.lib.minilm import bundled_model, sample_texts
from benchmarks.lib.results import progress, publish
from benchmarks.lib.servers import free_port, running, vecmill_command
from benchmarks.lib.timed_http import TimedConnection, polled
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
WIDTHS = (256, 512)
FEWEST_TOKENS, MOST_TOKENS = 20, 60
SEED = 21
TOLERANCE = 5e-3  # bfloat16, which the server chooses where the processor multiplies in it
CHECKED = 64  # texts
CEILING, REFERENCE = "tokenizers and the table alone", "sentence-transformers"
IN_PROCESS_PART = 1024  # texts of one call
GIGABYTES_10 = str(10 * 2**30)


@dataclass(frozen=True)
class Wire:
    """One way to ask the server."""

    path: str
    body: Callable[[Sequence[str]], dict[str, Any]]
    vectors: Callable[[Any], Vectors]
    headers: Mapping[str, str]


NO_STORE = {"Cache-Control": "no-store"}


def _of_base64(answer: Any) -> Vectors:
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer["data"]])


def _floats(answer: Any) -> Vectors:
    return np.asarray(answer, dtype=np.float32)


WIRES = {
    "/v1/embeddings, base64": Wire(
        "/v1/embeddings", lambda texts: {"input": list(texts), "encoding_format": "base64"}, _of_base64, NO_STORE
    ),
    "/v1/embeddings, base64, cached for later": Wire(
        "/v1/embeddings", lambda texts: {"input": list(texts), "encoding_format": "base64"}, _of_base64, {}
    ),
    "/embed, TEI": Wire("/embed", lambda texts: {"inputs": list(texts)}, _floats, NO_STORE),
}


def write_model(folder: Path, width: int, tokenizer_from: Path) -> Path:
    """A random table in the shape of potion's, normalised, with the bundled model's tokenizer."""
    tokenizer = json.loads((tokenizer_from / "tokenizer.json").read_text("utf-8"))
    tokenizer |= {"truncation": None, "padding": None, "post_processor": None}  # as model2vec saves it
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(SEED))
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "1_Normalize").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def make_texts(count: int) -> list[str]:
    """Pieces of the standard library's code, 20 to 60 tokens each; no two are equal."""
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    draw = random.Random(SEED)
    sources = sample_texts(4000)
    offsets = [each.offsets for each in tokenizer.encode_batch(sources, add_special_tokens=False)]
    texts: list[str] = []
    while len(texts) < count:
        number = draw.randrange(len(sources))
        length, spans = draw.randint(FEWEST_TOKENS - 1, MOST_TOKENS - 1), offsets[number]
        if len(spans) <= length:
            continue
        first = draw.randrange(len(spans) - length)
        texts.append(sources[number][spans[first][0] : spans[first + length - 1][1]])
    return texts


class Client:
    """Several connections, each of which sends its next request when its last one is answered."""

    def __init__(self, url: str, connections: int) -> None:
        self._connections = [TimedConnection(url) for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)

    def send_all(self, wire: Wire, bodies: Sequence[bytes]) -> list[bytes]:
        """The answers, in the bodies' order."""
        waiting = iter(list(enumerate(bodies)))
        answers = [b""] * len(bodies)

        def work(connection: TimedConnection) -> None:
            for number, body in waiting:
                headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **wire.headers}
                answers[number] = connection.send("POST", wire.path, body, headers).content

        for done in [self._threads.submit(work, each) for each in self._connections]:
            done.result()
        return answers

    def close(self) -> None:
        """Close them."""
        self._threads.shutdown()
        for connection in self._connections:
            connection.close()


def bodies(wire: Wire, texts: Sequence[str], batch: int) -> list[bytes]:
    """The requests."""
    return [json.dumps(wire.body(texts[at : at + batch])).encode() for at in range(0, len(texts), batch)]


@contextmanager
def serving(folder: Path, connections: int, serve: Sequence[str]) -> Iterator[tuple[str, Client]]:
    """vecmill on the model, with a cache as it has by default, and a client."""
    port = free_port()
    options = ("--embed-model", str(folder), "--rerank-model", "none", *serve)
    with running(vecmill_command(port, *options), port, "/ready", {"CACHE_MAX_BYTES": GIGABYTES_10}) as server:
        client = Client(server.url, connections)
        try:
            yield server.url, client
        finally:
            client.close()


def ceiling(folder: Path) -> Callable[[Sequence[str]], Vectors]:
    """A function from texts to unit vectors: the library's tokenizer on all cores, one gather, one mean."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table = load_file(folder / "model.safetensors")["embedding.weight"]

    def embed(texts: Sequence[str]) -> Vectors:
        ids = [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        starts = torch.tensor([0, *np.cumsum([len(each) for each in ids])[:-1]])
        flat = torch.from_numpy(np.fromiter(chain.from_iterable(ids), np.int64))
        means: Vectors = F.normalize(F.embedding_bag(flat, table, starts, mode="mean")).numpy()
        return means

    return embed


def reference(folder: Path) -> Callable[[Sequence[str]], Vectors]:
    """sentence-transformers' encode on the CPU."""
    from sentence_transformers import SentenceTransformer  # late: it takes seconds, --help should not

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def embed(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = model.encode(list(texts), batch_size=IN_PROCESS_PART, show_progress_bar=False)
        return vectors

    return embed


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One model's figures."""
    texts = make_texts(options.texts)
    in_process = {CEILING: ceiling(folder), REFERENCE: reference(folder)}
    rates: dict[str, list[float]] = {name: [] for name in (*WIRES, *in_process)}
    with serving(folder, options.connections, options.serve) as (url, client), torch.inference_mode():
        expected = in_process[REFERENCE](texts[:CHECKED])
        check = {name: _error(client, wire, texts[:CHECKED], expected) for name, wire in WIRES.items()}
        with progress(folder.name, options.rounds * len(rates)) as advance, watched() as contention:
            for number, name in enumerate(in_turns(list(rates), options.rounds)):
                new = [f"{number} {text}" for text in texts]
                call: Callable[[], object]
                if name in WIRES:
                    call = partial(client.send_all, WIRES[name], bodies(WIRES[name], new, options.batch))
                else:
                    call = partial(_in_parts, in_process[name], new)
                started = time.perf_counter()
                call()
                rates[name].append(len(texts) / (time.perf_counter() - started))
                advance(1)
        beside = _beside(url, client, texts, options)
    return {
        "texts_per_s": {name: spread(each) for name, each in rates.items()},
        "of_ceiling": {name: spread(_ratios(each, rates[CEILING])) for name, each in rates.items() if name in WIRES},
        "person_ms": beside,
        "error": max(check.values()),
        "other_cores": contention.other_cores,
    }


def _in_parts(embed: Callable[[Sequence[str]], Vectors], texts: Sequence[str]) -> None:
    for start in range(0, len(texts), IN_PROCESS_PART):
        embed(texts[start : start + IN_PROCESS_PART])


def _ratios(ours: Sequence[float], most: Sequence[float]) -> list[float]:
    return [mine / limit for mine, limit in zip(ours, most, strict=True)]


def _error(client: Client, wire: Wire, texts: Sequence[str], expected: Vectors) -> float:
    [answer] = client.send_all(wire, bodies(wire, texts, len(texts)))
    return float(np.abs(wire.vectors(json.loads(answer)) - expected).max())


def _beside(url: str, client: Client, texts: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a single text's request, alone and beside the lists."""
    wire = next(iter(WIRES.values()))
    alone, beside = TimedConnection(url), []
    query = bodies(wire, texts[:1], 1)[0]
    headers = {"Content-Type": "application/json", **wire.headers}
    quiet = [alone.send("POST", wire.path, query, headers).milliseconds for _ in range(options.queries)]
    with ThreadPoolExecutor(1) as thread, polled(url) as polls:
        load = thread.submit(client.send_all, wire, bodies(wire, texts, options.batch))
        while not load.done():
            beside.append(alone.send("POST", wire.path, query, headers).milliseconds)
            time.sleep(0.02)
    alone.close()
    return {
        "alone_p50": statistics.median(quiet),
        "beside_p50": statistics.median(beside),
        "beside_longest": max(beside),
        "ready_longest": max(polls.milliseconds),
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=20_000, help="of each side in each round")
    parser.add_argument("--batch", type=int, default=1000, help="texts of a request")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--queries", type=int, default=50, help="single texts, for their latency")
    parser.add_argument("--only", type=int, choices=WIDTHS, help="only the table of this width")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    given = list(sys.argv[1:] if arguments is None else arguments)
    serve = list(dropwhile(lambda word: word != "--serve", given))
    options = parser.parse_args(given[: len(given) - len(serve)])
    options.serve = serve[1:]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store; status 1 where vectors differ."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    models = {}
    with TemporaryDirectory() as folder:
        for width in [options.only] if options.only else WIDTHS:
            model = write_model(Path(folder, f"static-{width}"), width, bundled_model())
            models[str(width)] = figures = measure(model, options)
            shutil.rmtree(model)
            console.print(f"\n{width} dimensions, apart from {REFERENCE} by {figures['error']:.1e}; texts/s:")
            for name, rates in figures["texts_per_s"].items():
                share = f", of the ceiling {shown(figures['of_ceiling'][name])}" if name in WIRES else ""
                console.print(f"  {name}: {shown(rates)}{share}")
            told = ", ".join(f"{name} {value:.1f}" for name, value in figures["person_ms"].items())
            console.print(f"  one text beside the lists, ms: {told}")
    print_disturbance(console, max(each["other_cores"] for each in models.values()))
    settings = {key: value for key, value in vars(options).items() if key not in ("no_store", "only")}
    publish(
        "static_embedding",
        {"host": describe_host(), "settings": settings, "models": models},
        store=not options.no_store,
    )
    return 0 if all(each["error"] <= TOLERANCE for each in models.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
