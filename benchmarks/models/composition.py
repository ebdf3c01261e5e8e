"""How far a batch's composition moves vectors and scores, and what DETERMINISTIC=true costs.

Ragged rows of random tokens are run one by one, and then in random batches: packed, as the server does, and as with
DETERMINISTIC. Of each model and type: the largest change of a value (of unit vectors, or of a reranker's logits), the
least cosine, how many answers have other bits, and rows a second. With DETERMINISTIC nothing may change.

    python -m benchmarks.models.composition                          # the bundled model
    python -m benchmarks.models.composition FOLDER --rerank FOLDER   # in the hub's layout
    python -m benchmarks.models.composition --families               # tiny random models of every family
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import benchmarks.lib.threads  # noqa: F401  # before torch
import numpy as np
import torch
from benchmarks.lib.host import describe_host
from benchmarks.lib.minilm import bundled_model
from benchmarks.lib.results import publish
from benchmarks.models.workloads import answers_of

from vecmill.core.types import Row, Task
from vecmill.engine import determinism
from vecmill.engine.device import configure_device, describe, dtype_name, has_flash_attention
from vecmill.engine.forward import CpuThreads, Device, LoadedModel, launch
from vecmill.engine.loader import attention_of
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import load_model
from vecmill.models.weights import Target

LONGEST = 256  # tokens
DTYPES = (torch.float32, torch.bfloat16)

Vectors = np.typing.NDArray[np.float32]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="embedding models (default: the bundled one)")
    parser.add_argument("--rerank", nargs="*", type=Path, default=[], help="rerankers")
    parser.add_argument("--families", action="store_true", help="the tests' tiny models; needs the repository")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4, help="random batches of each (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--no-store", action="store_true", help="write no file under benchmarks/results")
    return parser.parse_args(arguments)


def sources(options: argparse.Namespace, root: Path) -> Iterator[Source]:
    """The models to measure."""
    if options.families:
        from tests.models.families import tiny_models  # the tests are not installed

        for tiny in tiny_models():
            folder = tiny.write(root / str(tiny))
            yield Source(folder.name, folder, tiny.task)  # some are known by their name
        return
    folders = options.folders or ([] if options.rerank else [bundled_model()])
    yield from (Source(folder.name, folder, Task.EMBED) for folder in folders)
    yield from (Source(folder.name, folder, Task.RERANK) for folder in options.rerank)


def answers(model: LoadedModel, rows: Sequence[Row], device: Device) -> Vectors:
    """(n, width) in the rows' order."""
    return np.stack(answers_of(launch(model, rows, device)))


def measure(
    source: Source, dtype: torch.dtype, device: Device, threads: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Both ways, over the same rows and batches. `threads`: all that passes may have on a CPU."""
    checkpoint = read(source)
    network = load_model(checkpoint, Target(dtype, device.device))
    flash = device.device.type == "cuda" and has_flash_attention(device.device)
    attention = attention_of(checkpoint, device.device, dtype, flash=flash, largest_head=network.largest_head)
    random = np.random.default_rng(0)
    lengths = random.integers(4, min(LONGEST, checkpoint.max_model_len), options.rows)
    rows = [Row(random.integers(0, network.vocab_size, int(length)).astype(np.int32)) for length in lengths]
    result: dict[str, Any] = {"model": source.id, "dtype": dtype_name(dtype)}
    for name, alone in (("packed", False), ("deterministic", True)):
        model = LoadedModel(
            cast(Any, None),
            checkpoint,
            network,
            cast(Any, None),
            attention,
            threads=CpuThreads(threads, fixed=alone),
            alone=alone,
        )
        wanted = np.concatenate([answers(model, [row], device) for row in rows])
        given, seconds = list[Vectors](), 0.0
        chosen = list[int]()
        for _ in range(options.rounds):
            order = random.permutation(len(rows))
            for part in np.array_split(order, 1 + len(rows) // 16):
                started = perf_counter()
                given.append(answers(model, [rows[index] for index in part], device))
                seconds += perf_counter() - started
                chosen.extend(part)
        result[name] = {**change(np.concatenate(given), wanted[chosen]), "rows_per_s": round(len(chosen) / seconds, 1)}
    result["rate_kept"] = round(result["deterministic"]["rows_per_s"] / result["packed"]["rows_per_s"], 3)
    return result


def change(given: Vectors, wanted: Vectors) -> dict[str, float]:
    """How far answers are from what they are alone."""
    other_bits = float((given.view(np.int32) != wanted.view(np.int32)).any(axis=1).mean())
    if wanted.shape[1] == 1:
        return {"other_bits": round(other_bits, 3), "largest_change": float(np.abs(given - wanted).max())}
    a, b = (
        each.astype(np.float64) / np.linalg.norm(each.astype(np.float64), axis=1)[:, None] for each in (given, wanted)
    )
    return {
        "other_bits": round(other_bits, 3),
        "largest_change": float(np.abs(a - b).max()),
        "one_minus_cosine": float(max(0.0, (1 - (a * b).sum(axis=1)).max())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store. Exit status 1 where DETERMINISTIC changed a bit."""
    options = parse_arguments(arguments)
    cuda = torch.cuda.is_available() if options.device is None else options.device == "cuda"
    place = torch.device("cuda", 0) if cuda else torch.device("cpu")
    determinism.configure(place)
    configure_device(place, 0.9)
    described, threads = describe(place), torch.get_num_threads()  # later this thread has what its last pass had
    device = Device.of(place, threads)
    found = []
    with TemporaryDirectory() as root:
        for source in sources(options, Path(root)):
            for dtype in DTYPES:
                found.append(measure(source, dtype, device, threads, options))
                print(found[-1], file=sys.stderr, flush=True)
    result = {"host": describe_host(), "device": described, "rows": options.rows, "models": found}
    publish("composition", result, store=not options.no_store)
    return 1 if any(each["deterministic"]["other_bits"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
