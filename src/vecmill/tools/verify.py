"""`vecmill verify`: numbers published of a model, or computed by sentence-transformers, and what the weights give."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from textwrap import shorten

import numpy as np
from rich import box
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vecmill.app import Server
from vecmill.config import Settings, load_settings
from vecmill.core.errors import StartupError, VecmillError
from vecmill.core.health import Health, Phase
from vecmill.core.types import EmbedRequest, Matrix, ModelCard, PromptChoice, ScoreRequest, Task, Vector
from vecmill.inference.facade import Inference
from vecmill.inference.vectors import cosines, similarities
from vecmill.models.card_examples import (
    Check,
    ComponentCheck,
    Example,
    ScoreCheck,
    VectorCheck,
    compared_texts,
    examples,
    find_example,
    names_of,
)
from vecmill.models.families import FAMILIES
from vecmill.models.source import find
from vecmill.tools.console import INTERRUPTED, messages, print_error, results
from vecmill.tools.library_example import library, library_example

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

AUTO = "auto"
NO_PROMPT = PromptChoice(instruction="")  # not the default prompt either
LOOK_EVERY = 0.1  # seconds between looks at the progress of the start
WIDEST_TEXT = 27  # characters of a text in the table, which then fits 80 columns
FEWEST_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Number:
    """One number of an example, and what the loaded weights give for it."""

    what: str
    expected: float
    measured: float
    tolerance: float

    @property
    def difference(self) -> float:
        return self.measured - self.expected

    @property
    def ok(self) -> bool:
        return abs(self.difference) <= self.tolerance

    @property
    def digits(self) -> int:
        """How many decimals show the tolerance."""
        return max(FEWEST_DIGITS, 1 - math.floor(math.log10(self.tolerance)))


@dataclass(frozen=True, slots=True)
class Verified:
    """An example on a loaded model."""

    example: Example
    card: ModelCard
    numbers: list[list[Number]]
    """The numbers of each check."""


def run_verify(
    model: str,
    *,
    rerank: bool = False,
    example: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> int:
    """Run a model card's example; the process's exit code: 0, 1 a number is off, 2 it cannot be run, 130 ^C."""
    try:
        chosen = _choose(model, example, rerank)
        task = chosen.task if chosen else Task.RERANK if rerank or _reranks(model) else Task.EMBED
        settings = _settings(model, task, dtype, device)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            verified = runner.run(_verify(settings, chosen, task, model))
    except VecmillError as error:
        print_error(error.message)
        return 2
    except KeyboardInterrupt:
        messages.print("vecmill: stopped.")
        return INTERRUPTED
    _show(verified)
    return 0 if all(number.ok for numbers in verified.numbers for number in numbers) else 1


def _choose(model: str, named: str | None, rerank: bool) -> Example | None:
    """The example by its own or by the model's name. None for `auto`, whose model is known only when loaded, and for a
    model of which no numbers are published, where sentence-transformers can compute some.

    Raises:
        StartupError: there is none, or it is not a reranker's and --rerank is given.
    """
    if named is None and model == AUTO:
        return None
    chosen = find_example([named] if named is not None else names_of(model))
    if chosen is None:
        if named is None and library() is not None:
            return None
        raise _no_example(model) if named is None else _unknown_example(named)
    if rerank and chosen.task is not Task.RERANK:
        raise StartupError(f"{chosen.model} is an embedding model: leave --rerank out, or name a reranker's --example.")
    return chosen


def _reranks(model: str) -> bool:
    """Whether a model without an example is a reranker that `vecmill models` lists."""
    listed = (each for family in FAMILIES.values() for each in family.examples)
    return any(each.id.casefold() == model.casefold() and each.task is Task.RERANK for each in listed)


def _unknown_example(name: str) -> StartupError:
    known = ", ".join(example.model for example in examples())
    return StartupError(f"--example {name}: no example of that name. There are: {known}.")


def _no_example(name: str) -> StartupError:
    return StartupError(
        f"{name}: no numbers are known that were published. Run `pip install sentence-transformers` and this again: "
        f"then it is compared with what that library makes of the same files. For a folder with another name, `vecmill "
        "verify FOLDER --example NAME` picks one of the models that `vecmill models --json` calls verifiable."
    )


def _settings(model: str, task: Task, dtype: str | None, device: str | None) -> Settings:
    """The settings of a server for this model alone, less those that change its numbers or name other models."""
    reranks = task is Task.RERANK
    models = {"embed_model": (AUTO,) if reranks else (model,), "rerank_model": (model,) if reranks else ("none",)}
    settings = load_settings({**models, "dtype": dtype, "device": device})
    changes: dict[str, object] = {"query_instruction": None, "max_model_len": None, "model_aliases": ()}
    if reranks:
        changes["embed_model"] = ()  # `auto` would load, and perhaps fetch, an embedder that nothing here asks
    return replace(settings, model=settings.model.model_copy(update=changes))


async def _verify(settings: Settings, chosen: Example | None, task: Task, model: str) -> Verified:
    server = Server(settings, lambda reason: None)
    try:
        await asyncio.gather(server.load(), _follow(server.health))
        phase, _, message = server.health.snapshot()
        if phase is Phase.FAILED:
            raise StartupError(message)
        card = next((card for card in server.inference.cards if card.task is task), None)
        if card is None:
            raise StartupError("RERANK_MODEL=auto is a reranker on a CUDA GPU only: name one to verify.")
        example = chosen or find_example([card.id]) or await _computed(card, settings, model)
        return Verified(example, card, [await _measure(check, server.inference, card) for check in example.checks])
    finally:
        await server.close()


async def _computed(card: ModelCard, settings: Settings, model: str) -> Example:
    """An example of what sentence-transformers makes of the files that were loaded."""
    messages.print(
        f"vecmill: no numbers are known that were published of {card.id}: sentence-transformers computes some."
    )
    token, revision = settings.model.hf_token, settings.model.revision_of(model)
    secret = token.get_secret_value() if token is not None else None
    folder = find(model, card.task, hf_token=secret, revision=revision).folder
    return await asyncio.to_thread(library_example, card, folder, compared_texts())


async def _follow(health: Health) -> None:
    """Show the progress of the start until it ends."""
    with _progress() as show:
        while (snapshot := health.snapshot())[0] is Phase.LOADING:
            show.update(show.task_ids[0], completed=snapshot[1], description=snapshot[2])
            await asyncio.sleep(LOOK_EVERY)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} % {task.description}", markup=False))
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        progress.add_task("starting", total=100)
        yield progress


async def _measure(check: Check, inference: Inference, card: ModelCard) -> list[Number]:
    tolerance = check.tolerance.of(card)
    if isinstance(check, ComponentCheck):
        vectors = await _embed(inference, check.texts, NO_PROMPT)
        return [
            Number(
                f"{_short(text)}\n  largest difference of {len(some)} components",
                0.0,
                _difference(vector, some),
                tolerance,
            )
            for text, vector, some in zip(check.texts, vectors, check.components, strict=True)
        ]
    if isinstance(check, VectorCheck):
        vectors = await _embed(inference, check.texts, NO_PROMPT)
        stored = np.asarray(check.vectors, dtype=np.float32)
        return [
            Number(f"{_short(text)}\n  cosine of the reference vectors", 1.0, _cosine(vector, reference), tolerance)
            for text, vector, reference in zip(check.texts, vectors, stored, strict=True)
        ]
    scores = await (_reranked if card.task is Task.RERANK else _embedded)(check, inference, card)
    pairs = [f"{_short(query)}\n  {_short(document)}" for query in check.queries for document in check.documents]
    expected = [number for row in check.expected for number in row]
    return [Number(*pair, tolerance) for pair in zip(pairs, expected, scores, strict=True)]


async def _embedded(check: ScoreCheck, inference: Inference, card: ModelCard) -> list[float]:
    prompted = check.prompted is True or (check.prompted == "files" and card.prompts_from == "files")
    as_query = PromptChoice(is_query=True, instruction=check.instruction) if prompted else NO_PROMPT
    as_document = PromptChoice(is_query=False) if prompted else NO_PROMPT
    own = check.measure == "similarity"
    queries = await _embed(inference, check.queries, as_query, normalize=not own)
    documents = await _embed(inference, check.documents, as_document, normalize=not own)
    compared = [
        similarities(card, query[None], documents) if own else cosines(query[None], documents) for query in queries
    ]
    return [float(score) * check.scale for scores in compared for score in scores]


async def _reranked(check: ScoreCheck, inference: Inference, card: ModelCard) -> list[float]:
    raw, instruction = check.measure == "raw", check.instruction
    answers = [
        await inference.score(ScoreRequest([query], check.documents, raw_scores=raw, instruction=instruction))
        for query in check.queries
    ]
    return [float(score) * check.scale for answer in answers for score in answer.scores]


async def _embed(
    inference: Inference, texts: tuple[str, ...], prompt: PromptChoice, *, normalize: bool = True
) -> Matrix:
    return (await inference.embed(EmbedRequest(texts, prompt=prompt, normalize=normalize))).embeddings


def _difference(vector: Vector, some: tuple[float, ...]) -> float:
    """The largest of the first components; NaN where there are fewer."""
    return float(np.abs(vector[: len(some)] - np.asarray(some)).max()) if len(some) <= len(vector) else math.nan


def _cosine(left: Vector, right: Vector) -> float:
    """The cosine of two vectors; NaN where their sizes differ."""
    return float(cosines(left[None], right[None])[0]) if left.shape == right.shape else math.nan


def _short(text: str) -> str:
    return shorten(text, WIDEST_TEXT, placeholder="…")


def _show(verified: Verified) -> None:
    card, example = verified.card, verified.example
    facts = [
        ("model", f"{card.id} ({'reranker' if card.task is Task.RERANK else 'embedding model'})"),
        ("revision", card.revision),
        ("dtype", f"{card.dtype}: {card.dtype_reason}"),
        ("device", card.device),
        ("example", example.model),
        *(("expected", source) for source in dict.fromkeys(check.source for check in example.checks)),
    ]
    for name, value in facts:
        results.print(f"{name:<9} {value}", soft_wrap=True)
    results.print()
    results.print(_table(verified.numbers))
    results.print()
    _show_verdict(verified)


def _table(checks: list[list[Number]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("what")
    for name in ("expected", "measured", "difference", "tolerance", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for number in (number for numbers in checks for number in numbers):
        digits = number.digits
        table.add_row(
            Text(number.what),
            f"{number.expected:.{digits}f}",
            f"{number.measured:.{digits}f}",
            f"{number.difference:+.{digits}f}",
            f"{number.tolerance:.{digits}f}",
            Text("ok", style="green") if number.ok else Text("OFF", style="bold red"),
        )
    return table


def _show_verdict(verified: Verified) -> None:
    numbers = [number for numbers in verified.numbers for number in numbers]
    off = [number for number in numbers if not number.ok]
    card, name = verified.card, verified.example.model
    if not off:
        sentence = f"ok: all {len(numbers)} numbers of {name} are within the tolerance of {card.dtype}."
        results.print(sentence, style="bold green", soft_wrap=True)
        return
    doubt = "" if card.dtype == "float32" else ", or with `--dtype float32` whether it is rounding"
    results.print(
        f"OFF: {len(off)} of {len(numbers)} numbers of {name} are off by more than the tolerance of {card.dtype}: "
        f"check that these are its weights and files{doubt}.",
        style="bold red",
        soft_wrap=True,
    )
