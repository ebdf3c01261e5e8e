"""What must be true on a card before its speed is worth a word: values, rotary angles, graphs, the engine, real HTTP.

Each proof is a function of the device that gives what it saw, with `ok`; on a CPU they show that they work.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.models.builds import RandomValues, build
from benchmarks.models.shapes import QUICK, QWEN3_0_6B, Shape
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from vecmill.core.types import Lane, Prefix, Row, Task, TokenIds
from vecmill.engine.cuda_graphs import CudaCapture, shape_of
from vecmill.engine.probes.attention import attention
from vecmill.models.checkpoint import Source, read
from vecmill.models.networks import Model, load_model
from vecmill.models.packed_attention import attention_on
from vecmill.models.packing import Attention, PrefixMemory, pack
from vecmill.models.weights import Target

if TYPE_CHECKING:
    from vecmill.engine.engine import Engine

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
CHECKPOINTS = {
    "qwen3": ("qwen3/embedding", Task.EMBED),
    "qwen3-reranker": ("qwen3/reranker", Task.RERANK),
    "nvembed": ("nvembed/checkpoint", Task.EMBED),
}
MOST_ANGLE_ERROR = 0.01
LEAST_COSINE = 0.998  # of tiny models in bfloat16 to float32
LEAST_SAME = 0.9999  # of one way to another in the same type
MOST_LOGIT_DIFFERENCE = 0.05

Proof = Callable[[torch.device], dict[str, Any]]


def rotary_angles(device: torch.device) -> dict[str, Any]:
    """transformers' rotary embedding against float64: some versions compute the angles as a product, TF32 allowed."""
    rotary = Qwen3RotaryEmbedding(Qwen3Config(head_dim=128, rope_theta=1e6)).to(device)
    x = torch.zeros(1, device=device)
    errors = {}
    for start in (0, 2048, 8192, 32000):
        positions = torch.arange(start, start + 736, device=device)[None]
        cosines, _ = rotary(x, positions)
        wanted = (positions[0, :, None].double() * rotary.inv_freq.double()).cos().repeat(1, 2)
        errors[str(start)] = float((cosines[0].double() - wanted).abs().max())
    return {"largest_error": errors, "ok": max(errors.values()) < MOST_ANGLE_ERROR}


def attention_values(device: torch.device) -> dict[str, Any]:
    """Variable-length attention against SDPA row by row."""
    result = attention(str(device))
    assert result.largest_difference is not None
    return {"largest_difference": result.largest_difference, "ok": result.largest_difference < 0.05}


def prefixes(device: torch.device) -> dict[str, Any]:
    """Rows after a shared prefix, new and recalled, against whole rows."""
    model = _golden("qwen3", device)
    random = np.random.default_rng(0)

    def ids(length: int) -> TokenIds:
        return random.integers(0, model.vocab_size, length).astype(np.int32)

    prefix, memory = Prefix(ids(37)), PrefixMemory()
    tails = [ids(length) for length in (1, 5, 64, 90)]
    wanted = _run(model, [Row(np.concatenate((prefix.token_ids, tail))) for tail in tails], device)
    cosines = []
    for _ in range(2):
        packed = pack([Row(tail, prefix=prefix) for tail in tails], device, memory, attention=_attention(device))
        answers = model.forward(packed)
        for new in packed.new_prefixes:
            memory.keep(new.prefix, new.layers)
        cosines.append(_least_cosine(answers.cpu()[np.argsort(packed.order)], wanted))
    return {"new_and_recalled": cosines, "ok": min(cosines) > LEAST_SAME}


def flash_and_sdpa(device: torch.device) -> dict[str, Any]:
    """Every family with golden data: flash kernels against SDPA."""
    differences = {}
    for name in CHECKPOINTS:
        model = _golden(name, device)
        rows = _rows(model, (1, 3, 64, 64, 120))
        differences[name] = _difference(_run(model, rows, device), _run(model, rows, device, flash=False))
    return {**differences, "ok": all(each["ok"] for each in differences.values())}


def graphs_equal(device: torch.device) -> dict[str, Any]:
    """Every family: batches of many lengths in captured passes, against the same launched kernel by kernel."""
    if device.type != "cuda":
        return {"ok": True, "skipped": "CUDA graphs need a GPU"}
    differences = {}
    for name, model in {**{each: _golden(each, device) for each in CHECKPOINTS}, "bert": _bert(device)}.items():
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        capture = CudaCapture(model, device, dict.fromkeys(Lane, stream))
        passes = {shape: capture(shape) for shape in (shape_of(tokens, 64) for tokens in (256, 112, 48, 16))}
        worst: dict[str, Any] = {"ok": True}
        for lengths in ((5,), (16,), (1, 2, 3), (7,) * 9, (30, 30), (100,), (100, 20, 3), (250,), (64, 64, 64, 60)):
            rows = _rows(model, lengths, name == "nvembed")
            shape = next(shape for shape in reversed(passes) if shape.holds(lengths))
            with torch.cuda.stream(stream):
                packed = pack(rows, device, shape=shape, attention=_attention(device))
                answers = passes[shape](packed)[: len(rows)].cpu()
            difference = _difference(answers[np.argsort(packed.order)], _run(model, rows, device))
            if not difference["ok"] or "cosine" not in worst or difference["cosine"] < worst["cosine"]:
                worst = difference
        differences[name] = worst
    return {**differences, "ok": all(each["ok"] for each in differences.values())}


def no_waiting(device: torch.device) -> dict[str, Any]:
    """A forward pass is launched without waiting for the device: torch raises where an operation does."""
    if device.type != "cuda":
        return {"ok": True, "skipped": "there is nothing to wait for on a CPU"}
    for model in (_golden(name, device) for name in CHECKPOINTS):
        rows = _rows(model, (16, 100, 120))
        _run(model, rows, device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.forward(pack(rows, device, attention=_attention(device)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


VALUES: Mapping[str, Proof] = {
    proof.__name__: proof
    for proof in (attention_values, rotary_angles, prefixes, flash_and_sdpa, graphs_equal, no_waiting)
}


def _golden(name: str, device: torch.device) -> Model:
    folder, task = CHECKPOINTS[name]
    checkpoint = read(Source(name, GOLDEN / folder, task))
    return load_model(checkpoint, Target(_dtype(device), device))


def _bert(device: torch.device) -> Model:
    shape: Shape = {**QUICK.encoders["tiny BERT"][1]}
    with TemporaryDirectory() as folder:
        return build("bert", shape, Target(_dtype(device), device), Path(folder))


def _attention(device: torch.device, *, flash: bool = True) -> Attention:
    return attention_on(device, _dtype(device), flash=flash)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _rows(model: Model, lengths: Sequence[int], unpooled: bool = False) -> list[Row]:
    random = np.random.default_rng(0)
    return [
        Row(random.integers(0, model.vocab_size, length).astype(np.int32), unpooled=length // 2 if unpooled else 0)
        for length in lengths
    ]


def _run(model: Model, rows: Sequence[Row], device: torch.device, *, flash: bool = True) -> Tensor:
    """(N, width) on the CPU in the rows' order."""
    packed = pack(rows, device, attention=_attention(device, flash=flash))
    return model.forward(packed).cpu()[np.argsort(packed.order)]


def _least_cosine(actual: Tensor, wanted: Tensor) -> float:
    return float(F.cosine_similarity(actual, wanted, dim=1).nan_to_num(nan=-1).min())


def _difference(actual: Tensor, wanted: Tensor) -> dict[str, Any]:
    if actual.shape[1] == 1:  # logits
        largest = float((actual - wanted).abs().nan_to_num(nan=1e9).max())
        return {"cosine": 1.0 - largest, "largest_difference": largest, "ok": largest < MOST_LOGIT_DIFFERENCE}
    cosine = _least_cosine(actual, wanted)
    return {"cosine": cosine, "bits": bool(torch.equal(actual, wanted)), "ok": cosine > LEAST_SAME}


# The engine. Needs pydantic and pydantic-settings.

WAYS: Mapping[str, Mapping[str, Any]] = {
    "as it starts": {},
    "without graphs": {"cuda_graphs": False},
    "without graphs or compiler": {"cuda_graphs": False, "torch_compile": "false"},
    "float32": {"dtype": "float32", "torch_compile": "false"},
    "without flash kernels": {"use_flash_attn": False, "torch_compile": "false"},
}


def engine_overlap(device: torch.device, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """60 batches at once in both lanes, with prefixes: the vectors of float32 on a CPU, however the model is run."""
    wanted = _all_vectors("cpu", {"dtype": "float32", "torch_compile": "false"})[0]
    for name, flags in WAYS.items():
        vectors, again, about = _all_vectors(device.type, flags)
        cosine = _least_cosine(torch.from_numpy(vectors), torch.from_numpy(wanted))
        same_bits = bool((vectors == again).all())
        keep(name, {"cosine": cosine, "same_bits_again": same_bits, **about, "ok": cosine > LEAST_COSINE})


def _all_vectors(device: str, flags: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    batches = _batches()
    with tiny_engine(device, flags) as engine:
        loaded = engine.loaded.result()
        (key,) = loaded.models
        warmed = loaded.warmed[key]

        async def run() -> Any:
            lanes = [Lane.INTERACTIVE if number % 3 else Lane.BULK for number in range(len(batches))]
            results = await asyncio.gather(
                *(engine.run(key, rows, lane) for rows, lane in zip(batches, lanes, strict=True))
            )
            return np.array([row for result in results for row in result.rows], dtype=np.float32)

        vectors, again = asyncio.run(run()), asyncio.run(run())
        about = {"layers": warmed.compile_reason, "graphs": loaded.models[key].graphs.reason, "count": warmed.graphs}
    return vectors, again, about


@contextmanager
def tiny_engine(device: str, flags: Mapping[str, Any]) -> Iterator[Engine]:
    """The server's engine on the golden Qwen3, warm."""
    from vecmill.config import load_settings  # what these need may be missing, and only they fail then
    from vecmill.engine.engine import Engine

    settings = load_settings(
        {
            "embed_model": str(GOLDEN / "qwen3" / "embedding"),
            "rerank_model": "none",
            "device": device,
            "max_batch_tokens": 4096,
            **flags,
        }
    )
    engine = Engine(settings.model, settings.engine, lambda percent, message: None)
    engine.start()
    engine.loaded.result(120)
    try:
        yield engine
    finally:
        engine.close()


def _batches() -> list[list[Row]]:
    random = np.random.default_rng(0)
    batches = []
    for number in range(60):
        lengths = random.integers(1, 60, 30) if number % 4 else random.integers(1, 9, 3)
        rows = [Row(random.integers(0, 200, length).astype(np.int32)) for length in lengths]
        if number % 3 == 0:
            prefix = Prefix(rows[0].token_ids)
            rows += [Row(row.token_ids, prefix=prefix) for row in rows[1:5]]
        batches.append(rows)
    return batches


# Real HTTP. Needs all that the server needs.


def person_beside_bulk(
    device: torch.device, keep: Callable[[str, dict[str, Any]], None], *, tiny: bool, seconds: float
) -> None:
    """A person's queries alone, bulk alone, and both, over HTTP, on Qwen3-0.6B's shape with random weights."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "random-qwen3"
        write_checkpoint(folder, QUICK.encoders["tiny Qwen3"][1] if tiny else QWEN3_0_6B)
        for label, options in {"as it starts": (), "without graphs": ("--no-cuda-graphs",)}.items():
            serve = ("--embed-model", str(folder), "--rerank-model", "none", "--device", device.type, *options)
            keep(label, _attempt(partial(_mixed_load, serve, seconds)))
            if device.type != "cuda":
                return


def _mixed_load(serve: Sequence[str], seconds: float) -> dict[str, Any]:
    """The report of `vecmill bench --mixed` on a server with these options."""
    from benchmarks.lib.servers import free_port, running, vecmill_command

    port = free_port()
    with running(vecmill_command(port, *serve), port, "/ready") as server:
        bench = [sys.executable, "-m", "vecmill", "bench", server.url, "--mixed", "--json"]
        bench += ["--seconds", str(seconds), "--connections", "8", "--batch", "64"]
        done = subprocess.run(bench, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-800:])
    return {**json.loads(done.stdout), "ok": True}


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """Random weights in the hub's layout, with the tiny checkpoint's tokenizer."""
    source = GOLDEN / "qwen3" / "embedding"
    shutil.copytree(source, folder)
    stored = json.loads((source / "config.json").read_text())
    config = {**stored, **shape, "vocab_size": stored["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**config))
    values = RandomValues(torch.device("cpu"), torch.bfloat16)
    weights = {name: values.parameter(name, each.shape) for name, each in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def run_values(device: torch.device, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Every proof of values; one that raises does not end the others."""
    for name, proof in VALUES.items():
        keep(name, _attempt(partial(proof, device)))


def _attempt(proof: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return proof()
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {str(error)[:800]}"}
