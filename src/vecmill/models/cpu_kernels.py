"""Steps between the matrix products of a forward pass on a CPU that are compiled where they run: `cpu_kernels.cpp`.

torch computes each step as several operations, each of which reads and writes all values once more, and two passes that
run at the same time share the memory's bandwidth. The file is compiled with the system's compiler at the first start on
a machine, in half a second, for the processor that is there, and kept in the user's cache. Without a compiler, or where
the trial finds another result or no gain, the steps stay torch's.

The kernels run in the calling thread, so passes in several threads keep torch's operations, which share their work out.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vecmill.core.errors import first_line, is_out_of_memory
from vecmill.models.child_process import inherited_environment

logger = logging.getLogger(__name__)

SOURCE = "cpu_kernels.cpp"
COMPILERS = ("c++", "g++", "clang++")
# Nothing that changes what is computed where values are not finite. Arm's compilers know processors as `-mcpu`.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
FOR_THIS_PROCESSOR = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
COMPILE_SECONDS, CHECK_SECONDS = 60, 20

STEP = 32
"""Norms are computed of widths that are multiples of it."""

# What the trial computes: the scores of 12 heads of 4 rows, and norms of their tokens.
TRIAL_ROWS, TRIAL_TOKENS, TRIAL_HEADS, TRIAL_WIDTH, TRIALS = 4, 128, 12, 384, 7
MOST_OFF = 0.01  # one rounding to bfloat16 moves a value by 0.4 %; a kernel that computes something else is far off
FAR = 1 << 40  # further than any key
NO_BIAS = (None, 0, 0, 0)

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# As in the source.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "gather": (None, [_POINTER, _POINTER, *[_INT] * 7, _POINTER, _POINTER, _INT]),
    "weigh": (
        _INT,
        [
            *[_POINTER] * 3,
            *[_INT] * 5,
            *[_POINTER] * 2,
            *[_INT] * 2,
            *[_FLOAT] * 3,
            *[_POINTER, *[_INT] * 3] * 2,
        ],
    ),
    "scatter": (None, [_POINTER, *[_INT] * 2, *[_POINTER] * 2, *[_INT] * 5, *[_POINTER] * 2]),
    "layer_norm": (None, [*[_POINTER] * 5, *[_INT] * 2, _FLOAT]),
    "rms_norm": (None, [*[_POINTER] * 2, _INT, _POINTER, *[_INT] * 3, *[_FLOAT] * 2, _INT]),
    "rotate": (None, [_POINTER, *[_INT] * 2, *[_POINTER] * 2, *[_INT] * 3]),
}
# What a process of its own runs first, every kernel once: an instruction that the processor does not have ends it, and
# not the server.
CHECK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
n, f = ctypes.c_int64, ctypes.c_float
a, b, c = ((ctypes.c_uint16 * 8192)(*[0x3f80] * 8192) for _ in range(3))
sums, flags = (ctypes.c_float * 64)(), (ctypes.c_uint8 * 64)()
first, count = (n * 1)(0), (n * 1)(19)
library.gather(a, b, n(40), n(40), n(1), n(1), n(1), n(20), n(40), first, count, n(20))
library.weigh(a, sums, flags, n(1), n(1), n(1), n(20), n(48), count, count, n(-9), n(9), f(0), f(9), f(1),
              b, n(0), n(0), n(48), c, n(0), n(0), n(48))
library.scatter(b, n(40), n(40), a, sums, n(1), n(1), n(1), n(20), n(40), first, count)
library.layer_norm(a, b, c, b, c, n(4), n(96), f(1e-5))
library.rms_norm(a, b, n(96), c, n(4), n(1), n(96), f(1e-5), f(1), n(1))
library.rotate(a, n(40), n(40), b, c, n(19), n(1), n(40))
"""
UNUSED_DAYS = 60
"""After which a library in the cache is removed: of an earlier version, or another compiler."""


Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Places:
    """Which tokens rows have: `counts[r]` from `tokens[r]` on; none where that is 0."""

    def __init__(self, tokens: Numbers, counts: Numbers) -> None:
        """(rows,) each."""
        # Held: what is passed on are their addresses.
        self._tokens, self._counts = (np.ascontiguousarray(each, dtype=np.int64) for each in (tokens, counts))
        self.most = int(counts.max())
        self.tokens, self.counts = int(self._tokens.ctypes.data), int(self._counts.ctypes.data)


class CpuKernels:
    """The compiled steps, as functions of bfloat16 tensors on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library

    def layer_norm(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, other: Tensor | None = None
    ) -> Tensor:
        """(..., width), of a width that is a multiple of STEP, to the same; of the sum with `other`, not rounded."""
        assert all(each is None or each.dtype is torch.bfloat16 for each in (hidden, weight, bias, other))
        hidden = hidden.contiguous()
        out, width = torch.empty_like(hidden), hidden.shape[-1]
        if other is not None:
            assert other.shape == hidden.shape
            other = other.contiguous()
        parts = (None if each is None else each.data_ptr() for each in (other, weight, bias))
        self.library.layer_norm(out.data_ptr(), hidden.data_ptr(), *parts, hidden.numel() // width, width, epsilon)
        return out

    def rms_norm(
        self, hidden: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, rounds: bool = True
    ) -> Tensor:
        """(..., width), of a width that is a multiple of STEP, to the same.

        Args:
            offset: added to the weight.
            rounds: whether what was divided is rounded before it is multiplied.
        """
        assert hidden.dtype is weight.dtype is torch.bfloat16
        hidden, width = _heads_together(hidden), hidden.shape[-1]
        out = torch.empty(hidden.shape, dtype=hidden.dtype)
        of_token, heads = (width, 1) if hidden.is_contiguous() else (hidden.stride(1), hidden.shape[2])
        shape = hidden.numel() // (heads * width), heads, width
        how = epsilon, offset, int(rounds)
        self.library.rms_norm(out.data_ptr(), hidden.data_ptr(), of_token, weight.data_ptr(), *shape, *how)
        return out

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate (1, heads, T, head_dim) in place by (1, T, head_dim) each, as transformers' `apply_rotary_pos_emb`."""
        _, count, tokens, width = heads.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        assert cos.shape == sin.shape == (1, tokens, width)
        assert cos.dtype is sin.dtype is torch.bfloat16
        turns = cos.data_ptr(), sin.data_ptr()
        self.library.rotate(heads.data_ptr(), *_strides(heads, count), *turns, tokens, count, width)


class Gather:
    """Brings tokens to where they are multiplied.

    This and the next two are made once for a batch, and called in each layer: what does not change is prepared.
    """

    def __init__(self, kernels: CpuKernels, places: Places, into: Tensor, *, clear: bool = False) -> None:
        """Prepare it.

        Args:
            places: which tokens.
            into: (kv_heads, rows, heads of each, slots, width), of which further slots may follow after each row's.
            clear: whether slots after a row's tokens become 0, where it has any.
        """
        heads, rows, each, slots, width = into.shape
        assert places.most <= slots
        assert into.dtype is torch.bfloat16
        self._function, self._held = kernels.library.gather, (places, into)
        self._into, self._heads = into.data_ptr(), heads * each
        sizes = heads, rows, each, into.stride(2) // width, width
        self._sizes = *sizes, places.tokens, places.counts, slots if clear else 0

    def __call__(self, tokens: Tensor) -> None:
        """`tokens`: (1, heads, T, width), of which values of a head are next to each other."""
        of_token, of_head = _strides(tokens, self._heads)
        self._function(self._into, tokens.data_ptr(), of_token, of_head, *self._sizes)


class Weigh:
    """Makes weights of scores in place: 2 to the power of them and `factor` times the biases."""

    def __init__(
        self,
        kernels: CpuKernels,
        scores: Tensor,
        sums: Tensor,
        out_of_range: np.ndarray[Any, np.dtype[np.uint8]],
        queries: Places,
        seen: Places,
        diagonals: tuple[int | None, int | None] = (None, None),
        in_range: tuple[float, float] = (0.0, np.inf),
        factor: float = 1.0,
    ) -> None:
        """Prepare it.

        Args:
            scores: (kv_heads, rows, heads of each, queries, keys), contiguous.
            sums: (kv_heads, rows, heads of each, queries) float32, becomes the sums of the weights of each query.
            out_of_range: (rows,), becomes 1 for a row of which a sum is not `in_range`.
            queries: how many each row has.
            seen: how many keys each row has.
            diagonals: the first and the last on which keys are seen; None: no limit.
        """
        assert queries.most <= scores.shape[3]
        assert seen.most <= scores.shape[4]
        assert scores.dtype is torch.bfloat16
        assert sums.dtype is torch.float32
        assert scores.is_contiguous()
        first, last = diagonals
        self._function, self._held = kernels.library.weigh, (scores, sums, out_of_range, queries, seen)
        self._most = queries.most, seen.most
        self._arguments = (
            scores.data_ptr(),
            sums.data_ptr(),
            int(out_of_range.ctypes.data),
            *scores.shape,
            queries.counts,
            seen.counts,
            -FAR if first is None else first,
            FAR if last is None else last,
            *in_range,
            factor,
        )

    def __call__(self, biases: Sequence[Tensor] = ()) -> bool:
        """Returns whether a row is out of range.

        Args:
            biases: up to two, (kv_heads, rows, queries, keys) with one head of each; of the first the keys lie next to
                each other, of the second the queries.
        """
        added: list[int | None] = []
        for bias, nearest in zip(biases, (3, 2), strict=False):
            assert bias.dtype is torch.bfloat16
            assert bias.stride(nearest) == 1
            assert bias.shape[2] >= self._most[0]
            assert bias.shape[3] >= self._most[1]
            added += [bias.data_ptr(), bias.stride(0), bias.stride(1), bias.stride(5 - nearest)]
        found: int = self._function(*self._arguments, *added, *NO_BIAS * (2 - len(biases)))
        return found > 0


class Scatter:
    """Brings what was multiplied back to the tokens, each divided by its query's sum."""

    def __init__(self, kernels: CpuKernels, values: Tensor, sums: Tensor, places: Places) -> None:
        """Prepare it.

        Args:
            values: (kv_heads, rows, heads of each, queries, width), contiguous.
            sums: (kv_heads, rows, heads of each, queries) float32
            places: which tokens.
        """
        assert places.most <= values.shape[3]
        assert values.dtype is torch.bfloat16
        assert sums.dtype is torch.float32
        assert values.is_contiguous()
        self._function, self._held = kernels.library.scatter, (values, sums, places)
        self._heads = values.shape[0] * values.shape[2]
        self._arguments = values.data_ptr(), sums.data_ptr(), *values.shape, places.tokens, places.counts

    def __call__(self, into: Tensor) -> None:
        """`into`: (1, heads, T, width), of which values of a head are next to each other."""
        of_token, of_head = _strides(into, self._heads)
        self._function(into.data_ptr(), of_token, of_head, *self._arguments)


def _heads_together(hidden: Tensor) -> Tensor:
    """The same values, of (1, T, heads, width) those of a token next to each other; of any other shape all of them."""
    together = hidden.dim() == 4 and hidden.shape[0] == 1 and hidden.stride()[2:] == (hidden.shape[3], 1)
    return hidden if together else hidden.contiguous()


def _strides(tokens: Tensor, heads: int) -> tuple[int, int]:
    """Those of a token and of a head, of (1, heads, T, width)."""
    _, of_head, of_token, of_value = tokens.stride()
    assert of_value == 1
    assert tokens.dtype is torch.bfloat16
    assert tokens.shape[1] == heads
    return of_token, of_head


def in_one_thread(kernels: CpuKernels | None) -> CpuKernels | None:
    """The kernels, if a pass in this thread has one thread; None where they are None."""
    return kernels if kernels is not None and torch.get_num_threads() == 1 else None


@lru_cache
def cpu_kernels() -> CpuKernels | None:
    """Those of this machine, compiled if need be; None where they cannot be had, or gain nothing."""
    if sys.platform != "linux" or os.uname().machine not in FOR_THIS_PROCESSOR:
        return None
    try:
        kernels = _load()
        gain = _gain(kernels)
    except Exception as error:  # what compilers and loaders raise has many names
        if is_out_of_memory(error):  # says nothing of them: the next load tries again
            raise
        logger.info("steps between matrix products stay torch's: %s", first_line(error)[:200])
        return None
    if gain < 1:
        logger.info("steps between matrix products stay torch's: compiled ones are not faster here")
        return None
    return kernels


def _load() -> CpuKernels:
    """Those in the cache, or new ones.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: it fails, or the check does.
    """
    source = files("vecmill.models").joinpath(SOURCE).read_bytes()
    command = [*_compiler(), *FLAGS, FOR_THIS_PROCESSOR[os.uname().machine]]
    cache = _cache()
    cached = None if cache is None else cache / f"{_key(source, command)}.so"
    if cached is not None and cached.is_file() and _is_ours(cached):
        with suppress(OSError):  # it is not whole
            kernels = CpuKernels(ctypes.CDLL(str(cached)))
            os.utime(cached)
            return kernels
    with TemporaryDirectory(prefix="compiling-", dir=cache) as made:
        file = Path(made) / SOURCE
        file.write_bytes(source)
        library = file.with_suffix(".so")
        _run([*command, "-o", str(library), str(file)], COMPILE_SECONDS, file.parent)
        _run([sys.executable, "-I", "-S", "-c", CHECK, str(library)], CHECK_SECONDS, file.parent)
        kernels = CpuKernels(ctypes.CDLL(str(library)))
        if cached is not None:  # otherwise it is compiled anew at the next start
            library.chmod(0o700)
            library.rename(cached)
            _remove_unused(cached.parent)
        return kernels


def _compiler() -> list[str]:
    """CXX, or the first that is there. Raises FileNotFoundError where there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = wanted[:1] or COMPILERS
    found = next((path for path in map(shutil.which, names) if path is not None), None)
    if found is None:
        raise FileNotFoundError(f"there is no C++ compiler ({', '.join(names)})")
    return [found, *wanted[1:]]


def _run(command: Sequence[str], seconds: float, folder: Path) -> None:
    """With few of this process's variables, and temporary files in `folder`."""
    try:
        subprocess.run(  # noqa: S603  # the compiler that whoever starts the server has, and Python
            command,
            check=True,
            capture_output=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env={**inherited_environment(), "TMPDIR": str(folder)},
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or [""]
        line = next((line for line in said if "error" in line.lower()), said[-1])
        raise OSError(f"{Path(command[0]).name} ended with {error.returncode}: {line}") from error


def _cache() -> Path | None:
    """Where libraries are kept, beside those of other programs; None where nothing can be, or nothing loaded from."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home.mkdir(parents=True, exist_ok=True)
        for folder in (home / "vecmill", home / "vecmill" / "kernels"):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours(folder) or not os.access(folder, os.W_OK):
                return None
        return None if os.statvfs(folder).f_flag & os.ST_NOEXEC else folder
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None


def _remove_unused(cache: Path) -> None:
    """What has not been loaded for long, and what a process that was ended left behind."""
    for path in cache.iterdir():
        with suppress(OSError):
            if time() - path.stat().st_mtime > 86_400 * UNUSED_DAYS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _key(source: bytes, command: Sequence[str]) -> str:
    """Of all that decides what is in a library: the processor's instructions are taken from what the kernel says."""
    compiler = Path(command[0]).resolve()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = (*command, str(compiler), str(compiler.stat().st_mtime_ns), processor)
    return hashlib.sha256(b"\0".join((source, *(part.encode() for part in parts)))).hexdigest()[:32]


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user, or the administrator, may have written it."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@torch.inference_mode()
def _gain(kernels: CpuKernels) -> float:
    """How many times as long torch takes for the trial.

    Raises:
        OSError: a kernel gives other numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").bfloat16()

    norms, weight = random(TRIAL_ROWS * TRIAL_TOKENS, TRIAL_WIDTH), random(TRIAL_WIDTH)
    scores = random(TRIAL_HEADS, TRIAL_ROWS, 1, TRIAL_TOKENS, TRIAL_TOKENS)
    weights, sums = scores.clone(), torch.empty(scores.shape[:-1], dtype=torch.float32)
    rows = Places(np.zeros(TRIAL_ROWS, dtype=np.int64), np.full(TRIAL_ROWS, TRIAL_TOKENS))
    flags = np.zeros(TRIAL_ROWS, dtype=np.uint8)
    weigh = Weigh(kernels, weights, sums, flags, rows, rows)

    def compiled() -> tuple[Tensor, ...]:
        weights.copy_(scores)
        weigh()
        return weights, sums, kernels.layer_norm(norms, weight, weight, 1e-5)

    def torchs() -> tuple[Tensor, ...]:
        weights.copy_(scores).exp2_()
        return weights, weights.sum(-1), F.layer_norm(norms, weight.shape, weight, weight, 1e-5)

    _check_same([each.clone() for each in compiled()], torchs())
    # What takes less time, or is not in every model.
    seen = Places(np.zeros(TRIAL_ROWS, dtype=np.int64), np.full(TRIAL_ROWS, TRIAL_TOKENS - 13))
    biases = scores[:, :, 0].flip(0), scores[:, :, 0].flip(1).transpose(2, 3)
    weights.copy_(scores)
    Weigh(kernels, weights, sums, flags, rows, seen, (-40, 50))(biases)
    biased = (scores[:, :, 0].float() + biases[0] + biases[1]).exp2().tril_(50).triu_(-40)
    biased[..., TRIAL_TOKENS - 13 :] = 0
    heads = random(1, TRIAL_HEADS, TRIAL_ROWS * TRIAL_TOKENS, TRIAL_WIDTH // TRIAL_HEADS)
    cos, sin = random(2, 1, *heads.shape[2:])
    turned = heads.clone()
    kernels.rotate(turned, cos, sin)
    first, second = heads.float().chunk(2, dim=-1)
    rotated = heads.float() * cos + torch.cat((-second, first), dim=-1) * sin
    of_sum = F.layer_norm(norms.float() * 2, weight.shape, weight.float(), None, 1e-5)
    divided = norms * torch.rsqrt(norms.float().square().mean(-1, keepdim=True) + 1e-5)
    _check_same(
        (
            *(weights[:, :, 0], turned, kernels.layer_norm(norms, weight, None, 1e-5, norms)),
            *(kernels.rms_norm(norms, weight, 1e-5), kernels.rms_norm(norms, weight, 1e-5, offset=1.0, rounds=False)),
        ),
        (biased, rotated, of_sum, divided * weight, divided * (1 + weight.float())),
    )
    by_torch, by_kernels = fastest_in_one_thread((torchs, compiled), TRIALS)
    return by_torch / by_kernels


def _check_same(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raises OSError for numbers that are further off than their roundings, or for none."""
    for one, other in zip(given, wanted, strict=True):
        if not (one.float() - other.float()).norm() <= MOST_OFF * other.float().norm():
            raise OSError("compiled ones give other numbers here")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch shares the work of the calling thread's operations among so many threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_in_one_thread(ways: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """The seconds of the fastest of so many runs of each, in turns.

    In one thread: where others are busy too, several wait for each other at each step.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    with torch_threads(1):
        for _ in range(runs):
            for way, taken in zip(ways, seconds, strict=True):
                started = perf_counter()
                way()
                taken.append(perf_counter() - started)
    return [min(taken) for taken in seconds]
