"""A corpus of any size through Ray Data, with the engine in Ray's workers: no HTTP.

`TextEmbedder` is for pipelines of your own, `run_corpus` and `python -m vecmill.cluster.data` embed files. A worker
runs the parts of one server, without its socket: what it gives for a text is what that server's /v1/embeddings gives.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import islice
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
import typer
from numpy.typing import NDArray

from vecmill.batches.endpoint import Endpoint, LineResult
from vecmill.batches.input import InputLine
from vecmill.cluster import corpus as corpora
from vecmill.cluster.corpus import Answer, CorpusOptions, ShardDone
from vecmill.config import Settings, load_settings
from vecmill.config.settings import GROUPS
from vecmill.core.errors import StartupError
from vecmill.core.health import Phase
from vecmill.core.types import Caller, Lane
from vecmill.tools.console import INTERRUPTED, CommandError, UsageError, messages, print_error, results
from vecmill.tools.embed.batches import Failure, TextVector, answer_of, vectors_of
from vecmill.tools.embed.command import request_fields
from vecmill.tools.embed.requests import ENDPOINT
from vecmill.tools.embed.rows import TextRow
from vecmill.tools.embed.run import PROBE, RunProgress
from vecmill.tools.embed.work import SHOWN_REASONS

TOGETHER = 256  # texts handed to the models at once
A_LINE = 64  # of them in a request; a request with a text that is refused is made again, text by text
AHEAD = 4  # such groups: the device has the next to do while one is written
LOCAL_STORE_BYTES = 200_000_000  # of Ray's object store where this starts Ray: no text or vector goes through it
WAITING_SHARDS = 2  # handed to a worker: the one that it does and the next
MOST_BLOCKS = 10_000
T = TypeVar("T")


class LocalServer:
    """The parts of one server in this process, without its socket. For any thread."""

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        """Load the models. `settings`: by field name, over the environment.

        STATE_DIR is a folder of its own, so that several workers run on one machine. Nothing is kept in a cache, for a
        corpus has most texts once, unless `settings` or REDIS_URL say otherwise.

        Raises:
            CommandError: the server cannot start; the text is its reason.
        """
        self._folder = TemporaryDirectory(prefix="vecmill-", ignore_cleanup_errors=True)
        try:
            self._settings = worker_settings(settings or {}, self._folder.name)
        except StartupError as error:
            self._folder.cleanup()
            raise CommandError(error.message) from None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vecmill", daemon=True)
        self._thread.start()
        self._caller = Caller(client="ray", lane=Lane.BULK, dialect="batch")
        try:
            self._run(self._open()).result()
        except BaseException:
            self._end()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> None:
        # Late: whoever only plans a run, or asks for --help, does not wait for the whole server's imports.
        app = import_module("vecmill.app")
        self._broken: asyncio.Future[str] = self._loop.create_future()
        self._server = app.Server(self._settings, self._break)
        await self._server.open()
        await self._server.load()
        phase, _, reason = self._server.health.snapshot()
        if phase is Phase.FAILED:
            await self._server.close()
            raise CommandError(reason)
        lines = import_module("vecmill.http.batch_lines")
        endpoints = lines.batch_endpoints(
            self._server.inference, self._server.services.threads, self._settings.inference
        )
        self._endpoint: Endpoint = endpoints[ENDPOINT]

    def _break(self, reason: str) -> None:
        if not self._broken.done():
            self._broken.set_result(reason)

    def embed(self, texts: Sequence[str], fields: Mapping[str, Any]) -> Future[list[Answer]]:
        """Begin to embed texts, each with the fields of a request; the future has an answer for each, in order.

        It raises CommandError where the device has failed.
        """
        return self._run(self._embed(texts, fields))

    async def _embed(self, texts: Sequence[str], fields: Mapping[str, Any]) -> list[Answer]:
        groups = [texts[start : start + A_LINE] for start in range(0, len(texts), A_LINE)]
        answers: list[Answer] = []
        for group, line in zip(groups, await self._answered(groups, fields), strict=True):
            body = orjson.loads(line.body)
            if line.ok:
                answers += vectors_of(body)
            elif len(group) == 1:
                answers.append(answer_of(line.status, body))
            else:  # one of them is to blame
                answers += [
                    answer_of(each.status, orjson.loads(each.body))
                    for each in await self._answered([[text] for text in group], fields)
                ]
        return answers

    async def _answered(self, groups: Sequence[Sequence[str]], fields: Mapping[str, Any]) -> Sequence[LineResult]:
        """What /v1/embeddings answers to each group."""
        lines = [
            InputLine(number, str(number), {"input": list(group), "encoding_format": "base64", **fields})
            for number, group in enumerate(groups, 1)
        ]
        work = asyncio.ensure_future(self._endpoint.run(self._caller, lines))
        either: set[asyncio.Future[Any]] = {work, self._broken}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise CommandError(f"The device has failed: {self._broken.result()}")
        return work.result()

    def close(self) -> None:
        """End it. What is in progress is answered first."""
        self._run(self._server.close()).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()


def worker_settings(settings: Mapping[str, object], folder: str) -> Settings:
    """A worker's: those given over the environment, and its own folder.

    Raises:
        StartupError: one is unknown, or they contradict each other.
    """
    known = {name for group in GROUPS for name in group.model_fields}
    if unknown := sorted(set(settings) - known):
        raise StartupError(f"`{unknown[0]}` is no setting; docs/settings.md lists all.")
    own: dict[str, object] = {"state_dir": folder}
    if load_settings(settings).state.redis_url is None:
        own["cache_max_bytes"] = 0
    return load_settings({**own, **settings})


def embed_in_order(
    server: LocalServer, rows: Iterable[TextRow], fields: Mapping[str, Any]
) -> Iterator[tuple[TextRow, Answer]]:
    """Each row and what became of it, in order; a bounded number of rows is ahead."""
    waiting: deque[tuple[list[TextRow], Future[list[Answer]]]] = deque()
    source = iter(rows)
    while True:
        while len(waiting) < AHEAD and (group := list(islice(source, TOGETHER))):
            waiting.append((group, server.embed([row.text for row in group], fields)))
        if not waiting:
            return
        group, answers = waiting.popleft()
        yield from zip(group, answers.result(), strict=True)


class TextEmbedder:
    """Adds the vectors of a column of texts: for `Dataset.map_batches`, which runs it as actors, each with the models.

    dataset.map_batches(
        TextEmbedder,
        fn_constructor_kwargs={"column": "text", "settings": {"embed_model": "Qwen/Qwen3-Embedding-0.6B"}},
        concurrency=4,    # actors; (1, 8) lets Ray choose
        num_gpus=1,       # of each: a fraction lets several share a card; leave it out on a machine without GPU
        num_cpus=2,       # threads for tokenizing, and for the model where there is no GPU
        batch_size=1024,  # texts a call; the engine packs them into forward passes by itself
    )
    """

    def __init__(
        self,
        column: str = "text",
        output: str = "embedding",
        errors: str | None = None,
        fields: Mapping[str, Any] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Load the models.

        `column`: of strings. `output`: the new column, float32 of shape (rows, dimensions). `errors`: a column for why
        a text has no vector, empty where it has one; its vector is NaN. None: such a text raises. `fields`: what a
        request of /v1/embeddings has beside its input, such as `model`, `dimensions`, `input_type`. `settings`: of the
        server, by field name, over the worker's environment.

        Raises:
            CommandError: the settings or the fields are wrong, or the models cannot be loaded.
        """
        self._column, self._output, self._errors = column, output, errors
        self._fields = dict(fields or {})
        self._server, self.probe = started(settings, self._fields)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The batch with the column `output`, and `errors` where it was asked for.

        Raises:
            CommandError: a text has no vector, and there is no column for errors; or the device has failed.
        """
        rows = [TextRow(number, number, str(text)) for number, text in enumerate(batch[self._column], 1)]
        vectors = np.full((len(rows), len(self.probe.values) // 4), np.nan, np.float32)
        reasons = [""] * len(rows)
        for place, (row, answer) in enumerate(embed_in_order(self._server, rows, self._fields)):
            if isinstance(answer, TextVector):
                vectors[place] = np.frombuffer(answer.values, "<f4")
                continue
            if self._errors is None:
                raise CommandError(f"Text {row.number} of a batch of {len(rows)} has no vector: {answer.message}")
            reasons[place] = answer.message
        added = {self._output: vectors}
        if self._errors is not None:
            added[self._errors] = np.array(reasons, dtype=object)
        return {**batch, **added}

    def close(self) -> None:
        """End the server. Ray ends the process and need not call it."""
        self._server.close()


def started(settings: Mapping[str, object] | None, fields: Mapping[str, Any]) -> tuple[LocalServer, TextVector]:
    """A server, and the vector of one text, from which model and dimensions are known.

    Raises:
        CommandError: the settings or the fields are wrong, or the models cannot be loaded.
    """
    server = LocalServer(settings)
    (answer,) = server.embed([PROBE], fields).result()
    if isinstance(answer, Failure):
        server.close()
        raise CommandError(answer.message)
    return server, answer


class ShardEmbedder:
    """A worker of `run_corpus`: reads a shard, embeds it and writes it."""

    def __init__(self, output: str, settings: Mapping[str, object]) -> None:
        """The corpus is read from the output's manifest: Ray could lose what it was handed, and it may be large."""
        self._output, self._corpus = output, corpora.read_manifest(output)
        self._fields = self._corpus.options.fields
        self._problem = ""
        try:
            self._server, self._probe = started(settings, self._fields)
        except CommandError as error:  # Ray would wrap it in pages, and start the worker again
            self._problem = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`{"shard": number}` to `{"done": ..., "problem": ...}`, the first as JSON of a `ShardDone`."""
        if self._problem:
            return {"done": "", "problem": self._problem}
        try:
            done = corpora.write_shard(
                self._output, self._corpus, int(row["shard"]), self._embed, self._probe.model, self._dimensions
            )
        except CommandError as error:
            return {"done": "", "problem": str(error)}
        return {"done": orjson.dumps(asdict(done)).decode(), "problem": ""}

    def close(self) -> None:
        """End the server. Ray ends the process and need not call it."""
        self._server.close()

    @property
    def _dimensions(self) -> int:
        return len(self._probe.values) // 4

    def _embed(self, rows: Iterable[TextRow]) -> Iterator[tuple[TextRow, Answer]]:
        return embed_in_order(self._server, rows, self._fields)


@dataclass(frozen=True, slots=True)
class Workers:
    """How many, and what each has."""

    count: int | None = None
    """None: one for each GPU of the cluster, else one."""
    gpus: float | None = None
    """Of each; None: 1 where there are GPUs, else 0."""
    cpus: float = 1.0
    """Of each. Where there is no GPU, as many threads compute."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of their servers, by field name, over their environment."""
    worker: type[ShardEmbedder] = ShardEmbedder


def run_corpus(
    output: str, options: CorpusOptions, workers: Workers, *, overwrite: bool = False, address: str | None = None
) -> Sequence[ShardDone]:
    """Embed a corpus into a folder of Parquet files; what the same call left undone earlier is done now.

    `address`: of a Ray cluster; None: RAY_ADDRESS, or Ray on this machine while it runs.

    Raises:
        CommandError, UsageError: it cannot be done, or not all of it; what is done stays.
    """
    began = monotonic()
    corpus, done = corpora.take_up(output, options, overwrite=overwrite)
    ended = {each.shard for each in done}
    missing = [number for number in range(len(corpus.shards)) if number not in ended]
    with RunProgress() as show:
        rows = sum(corpus.shards[number].rows for number in ended)
        show.begin(corpus.rows, rows)
        show.doing("starting")
        if missing:
            with _ray(address) as ray:
                for each in _results(ray, output, missing, workers):
                    done.append(each)
                    rows += corpus.shards[each.shard].rows
                    show.doing("embedding")
                    show.answered(rows)
    done.sort(key=lambda each: each.shard)
    _check_one_model(done)
    corpora.finish(output, corpus, done)
    _summarise(output, done, len(missing), monotonic() - began)
    return done


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, started for the block unless it runs already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise UsageError("A corpus is embedded by Ray Data: pip install 'vecmill[ray-data]'.") from error
    if ray.is_initialized():
        yield ray
        return
    alone = address is None and not os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address=address,
            logging_level="warning",
            log_to_driver=False,
            **({"object_store_memory": LOCAL_STORE_BYTES, "include_dashboard": False} if alone else {}),
        )
    except (ConnectionError, RuntimeError) as error:
        raise CommandError(f"Ray cannot be reached or started: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _results(ray: Any, output: str, missing: Sequence[int], workers: Workers) -> Iterator[ShardDone]:
    """The shards, as they end."""
    data = ray.data
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = False
    cards = int(ray.cluster_resources().get("GPU", 0))
    gpus = workers.gpus if workers.gpus is not None else float(bool(cards))
    count = min(workers.count or max(1, cards), len(missing))
    shards = data.from_items(
        [{"shard": number} for number in missing], override_num_blocks=min(len(missing), MOST_BLOCKS)
    )
    embedded = shards.map(
        workers.worker,
        fn_constructor_args=(output, dict(workers.settings)),
        compute=data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=WAITING_SHARDS),
        num_cpus=workers.cpus,
        num_gpus=gpus or None,
    )
    for row in embedded.iter_rows():
        if row["problem"]:
            raise CommandError(f"{row['problem']} What is done stays: the same command goes on with the rest.")
        yield ShardDone(**orjson.loads(row["done"]))


def _check_one_model(done: Sequence[ShardDone]) -> None:
    kinds = sorted({(each.model, each.dimensions) for each in done})
    if len(kinds) > 1:
        raise CommandError(
            f"Vectors come from {kinds[0][0]} ({kinds[0][1]} dimensions) and from {kinds[1][0]} ({kinds[1][1]}): the "
            f"settings have changed meanwhile. Begin again with --overwrite."
        )


def _summarise(output: str, done: Sequence[ShardDone], now: int, seconds: float) -> None:
    rows, failed = sum(each.rows for each in done), sum(each.failed for each in done)
    fresh = f", {now:,} of {len(done):,} shards now" if now < len(done) else ""
    kind = f" of {done[0].dimensions} values ({done[0].model})" if done else ""
    results.print(f"wrote     {output}: {rows - failed:,} vectors{kind}", soft_wrap=True)
    results.print(f"texts     {rows:,} in {seconds:,.1f} s{fresh}", soft_wrap=True)
    results.print(f"tokens    {sum(each.tokens for each in done):,}", soft_wrap=True)
    skipped: dict[str, int] = {}
    for each in done:
        for reason, count in each.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    for reason, count in sorted(skipped.items(), key=lambda item: -item[1])[:SHOWN_REASONS]:
        results.print(f"skipped   {count:,} x {reason}", soft_wrap=True)
    if failed:
        results.print(f"failed    {failed:,}, listed in {output}/_part-*.errors.jsonl", soft_wrap=True)


def command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files or folders of .jsonl, .jsonl.gz and .parquet: paths, or addresses such as s3://bucket/folder.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder, or its address.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Default: the first of EMBED_MODEL.")] = None,
    field_name: Annotated[str | None, typer.Option("--field", help="As for `vecmill embed`.")] = None,
    id_field: Annotated[str | None, typer.Option(help="As for `vecmill embed`.")] = None,
    string_ids: Annotated[bool, typer.Option("--string-ids", help="Write ids as strings.")] = False,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Of the vectors. Default: all.")] = None,
    input_type: Annotated[str | None, typer.Option(help="As for `vecmill embed`.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="As for `vecmill embed`.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows without a text.")] = False,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Write the texts too.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of an output file.")] = corpora.SHARD_ROWS,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one for each GPU, else one.")] = None,
    num_gpus: Annotated[
        float | None, typer.Option(min=0, help="Of each worker. Default: 1 where there are GPUs.")
    ] = None,
    num_cpus: Annotated[float, typer.Option(min=0, help="Of each worker.")] = 1.0,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster. Default: RAY_ADDRESS, else Ray on this machine.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the workers' servers.")
    ] = None,
) -> None:
    """Embed a corpus by Ray's workers, into a folder of Parquet files as `vecmill embed` writes them.

    After an interruption the same command goes on where it was. Exit code 0: all texts have a vector; 1: some have
    none, or it was given up; 2: the options or the input are wrong; 130: interrupted.
    """
    try:
        settings = _settings(setting or [])
        fields = request_fields(model, dimensions, None, input_type, prompt_name)
        options = CorpusOptions(tuple(inputs), field_name, id_field, skip_bad, string_ids, text, shard_rows, fields)
        done = run_corpus(
            output, options, Workers(workers, num_gpus, num_cpus, settings), overwrite=overwrite, address=address
        )
    except CommandError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        messages.print("vecmill: stopped; the same command goes on with the shards that are missing.")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(int(any(each.failed for each in done)))


def _settings(pairs: Sequence[str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: it must be NAME=VALUE.")
        settings[name.strip().lower()] = value
    try:
        worker_settings(settings, "/tmp")  # noqa: S108 - it is not opened: only the values are looked at
    except StartupError as error:
        raise UsageError(error.message) from None
    return settings


def main() -> None:
    """The entry point of `python -m vecmill.cluster.data`."""
    typer.run(command)


if __name__ == "__main__":
    # Ray's workers import the classes by the module's name, which `__main__` is not.
    sys.exit(import_module("vecmill.cluster.data").main())
