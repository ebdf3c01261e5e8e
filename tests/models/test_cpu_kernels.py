"""Steps that are compiled where they run: what they compute, where they come from, and when they are used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.loaded import compiled_steps
from vecmill.models import cpu_kernels
from vecmill.models.cpu_kernels import CpuKernels, Gather, Places, Scatter, Weigh
from vecmill.models.merged_projections import rotated

INF = float("inf")


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found = cpu_kernels.cpu_kernels()
    if found is None:
        pytest.skip("there are no compiled steps on this machine")
    return found


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def places(tokens: list[int], counts: list[int]) -> Places:
    return Places(np.array(tokens, dtype=np.int64), np.array(counts, dtype=np.int64))


def assert_rounded(given: Tensor, exact: Tensor) -> None:
    """Equal to the nearest value of bfloat16, or to the one beside it where it is close."""
    torch.testing.assert_close(given, exact.bfloat16(), rtol=2**-7, atol=1e-30)
    assert (given == exact.bfloat16()).float().mean() > 0.99


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    each=st.integers(1, 3),
    width=st.integers(1, 70),
    before=st.integers(0, 3),
)
def test_tokens_come_to_their_rows_and_back(
    kernels: CpuKernels, counts: list[int], heads: int, each: int, width: int, before: int
) -> None:
    """With slots before each row's own, and padding after them, that nothing else writes to."""
    starts = [3 + sum(counts[:row]) for row in range(len(counts))]
    tokens = values(1, 5 + sum(counts), heads * each, width).transpose(1, 2)
    rows = torch.full((heads, len(counts), each, before + 12, width), 7.0).bfloat16()
    Gather(kernels, places(starts, counts), rows[:, :, :, before:], clear=True)(tokens)
    wanted = torch.full_like(rows, 7.0)
    by_head = tokens[0].view(heads, each, *tokens.shape[2:])
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            wanted[:, row, :, before:] = 0
        wanted[:, row, :, before : before + count] = by_head[:, :, start : start + count]
    assert torch.equal(rows, wanted)

    attended = values(heads, len(counts), each, 9, width, seed=1)
    sums = torch.rand(heads, len(counts), each, 9) + 0.1
    out = torch.full((1, tokens.shape[2], heads * each, width), 7.0).bfloat16().transpose(1, 2)
    Scatter(kernels, attended, sums, places(starts, counts))(out)
    exact = torch.full(out.shape, 7.0)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        divided = (attended.float() / sums[..., None])[:, row, :, :count]
        exact[0, :, start : start + count] = divided.flatten(0, 1)
    assert_rounded(out, exact)


@settings(max_examples=80)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    keys=st.integers(1, 6),
    each=st.integers(1, 2),
    first=st.none() | st.integers(-60, 20),
    last=st.none() | st.integers(-60, 60),
    biases=st.integers(0, 2),
    data=st.data(),
)
def test_weights_are_those_of_the_keys_that_are_seen(
    kernels: CpuKernels,
    counts: list[int],
    keys: int,
    each: int,
    first: int | None,
    last: int | None,
    biases: int,
    data: st.DataObject,
) -> None:
    heads, width, rows, queries = 2, 16 * keys, len(counts), 48
    each = 1 if biases else each
    seen = [data.draw(st.integers(0, width)) for _ in counts]
    scores = values(heads, rows, each, queries, width)
    exact = scores.double()
    reach = max(seen), max(counts)
    by_query = values(heads, rows, queries, width + 8, seed=1)[:, :, :, : reach[0]]
    by_key = values(heads, rows, width, queries + 8, seed=2)[:, :, : reach[0]].transpose(2, 3)[:, :, : reach[1]]
    added = (by_query, by_key)[:biases]
    for bias in added:
        exact[:, :, 0, : reach[1], : reach[0]] += 1.5 * bias[:, :, : reach[1]].double()
    query, key = torch.arange(queries)[:, None], torch.arange(width)
    visible = (key >= query + first if first is not None else True) & (
        key <= query + last if last is not None else True
    )
    plain, sums, bad = scores.clone(), torch.full(scores.shape[:-1], 7.0), np.zeros(rows, dtype=np.uint8)
    weigh = Weigh(
        kernels,
        scores,
        sums,
        bad,
        places([0] * rows, counts),
        places([0] * rows, seen),
        (first, last),
        (1e-9, 1e9),
        1.5,
    )

    found = weigh(added)

    for row, (count, known) in enumerate(zip(counts, seen, strict=True)):
        own = (heads, each, count, width)
        wanted = torch.where(
            (visible & (key < known)).expand(queries, width)[:count], exact[:, row, :, :count].exp2(), 0
        )
        torch.testing.assert_close(
            scores[:, row, :, :count].double(), wanted, rtol=0.03 if biases > 1 else 2**-8, atol=1e-30
        )
        torch.testing.assert_close(
            sums[:, row, :, :count].double(), wanted.sum(-1), rtol=0.03 if biases > 1 else 1e-5, atol=0
        )
        assert scores[:, row, :, :count].shape == own
        assert torch.equal(scores[:, row, :, count:], plain[:, row, :, count:])
        assert (sums[:, row, :, count:] == 7).all()
        assert bool(bad[row]) == bool((wanted.sum(-1) == 0).any())
    assert found == bool(bad.any())


@pytest.mark.parametrize("score", [-INF, -1e30, -200.0, -126.0, 0.0, 127.0, 128.0, 1e30, INF, float("nan")])
def test_scores_of_any_size(kernels: CpuKernels, score: float) -> None:
    """A sum that is not in range, or no number, is told."""
    scores, sums = torch.zeros(1, 1, 1, 3, 32).bfloat16(), torch.zeros(1, 1, 1, 3)
    scores[..., 1, 5] = score
    wanted = scores.double().exp2().sum(-1)
    bad = np.zeros(1, dtype=np.uint8)
    row = places([0], [3]), places([0], [32])
    assert Weigh(kernels, scores, sums, bad, *row, in_range=(1e-9, 2.0**100))() == bool(bad[0])
    assert sums[0, 0, 0, [0, 2]].tolist() == [32.0, 32.0]
    if score == -INF:  # is no score, and may give no number: then torch's kernel computes the row
        assert bad[0] or sums[0, 0, 0, 1] == 31
    elif score > 100 or np.isnan(score):
        assert bad[0]
    else:
        assert not bad[0]
        torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 96), (2, 7, 384), (1, 5, 3, 64)])
def test_norms(kernels: CpuKernels, shape: tuple[int, ...], size: float) -> None:
    hidden, other = (size * values(*shape, seed=seed) for seed in (0, 1))
    weight, bias = values(shape[-1], seed=2), values(shape[-1], seed=3)
    exact, more, weights, biases = (each.double() for each in (hidden, other, weight, bias))
    epsilon, of = 1e-5, (shape[-1],)
    assert_rounded(kernels.layer_norm(hidden, weight, bias, epsilon), F.layer_norm(exact, of, weights, biases, epsilon))
    assert_rounded(kernels.layer_norm(hidden, weight, None, epsilon), F.layer_norm(exact, of, weights, None, epsilon))
    of_sum = F.layer_norm(exact + more, of, weights, biases, epsilon)
    assert_rounded(kernels.layer_norm(hidden, weight, bias, epsilon, other), of_sum)
    divided = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    assert_rounded(kernels.rms_norm(hidden, weight, epsilon), divided.bfloat16().double() * weights)
    of_gemma = kernels.rms_norm(hidden, weight, epsilon, offset=1.0, rounds=False)
    assert_rounded(of_gemma, divided * (1 + weights))
    assert kernels.rms_norm(hidden, weight, epsilon).isfinite().all()


def test_norms_of_heads_within_a_wider_tensor(kernels: CpuKernels) -> None:
    """As queries lie in a product that holds keys and values too."""
    whole, weight = values(1, 6, 5 * 64), values(64, seed=1)
    part = whole[:, :, 64:256].view(1, 6, 3, 64)
    assert not part.is_contiguous()
    assert torch.equal(kernels.rms_norm(part, weight, 1e-6), kernels.rms_norm(part.contiguous(), weight, 1e-6))
    across = values(1, 3, 6, 64).transpose(1, 2)
    assert torch.equal(kernels.rms_norm(across, weight, 1e-6), kernels.rms_norm(across.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("width", [8, 64, 96])
def test_heads_are_rotated_as_by_torch(kernels: CpuKernels, width: int) -> None:
    whole = values(1, 9, 4 * width)
    heads = whole[:, :, width : 3 * width].view(1, 9, 2, width).transpose(1, 2)
    angles = torch.rand(1, 9, width // 2).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    exact = rotated(heads.double(), cos.double(), sin.double())
    untouched = whole[:, :, [*range(width), *range(3 * width, 4 * width)]].clone()
    with compiled_steps(True):
        given = rotated(heads, cos, sin, kernels)
    torch.testing.assert_close(given.double(), exact, rtol=2**-8, atol=2**-9)
    assert torch.equal(whole[:, :, [*range(width), *range(3 * width, 4 * width)]], untouched)


def test_passes_in_several_threads_keep_torchs_operations(kernels: CpuKernels) -> None:
    for count in (1, 2):
        with cpu_kernels.torch_threads(count):
            assert (cpu_kernels.in_one_thread(kernels) is kernels) == (count == 1)
            assert cpu_kernels.in_one_thread(None) is None


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """Looks for kernels anew, in a cache of its own; gives the one line of the log, or nothing if there are kernels."""
    if sys.platform != "linux" or os.uname().machine not in cpu_kernels.FOR_THIS_PROCESSOR:
        pytest.skip("nothing is compiled here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def look() -> str:
        cpu_kernels.cpu_kernels.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, cpu_kernels.__name__):
            found = cpu_kernels.cpu_kernels()
        assert (found is None) == bool(caplog.messages)
        return "\n".join(caplog.messages)

    yield look
    cpu_kernels.cpu_kernels.cache_clear()


COMPILES = 'exec c++ "$@"'


def compiler(folder: Path, script: str) -> str:
    """A program in the compiler's place, which notes its calls."""
    made = folder / "compiler"
    made.write_text(f"#!/bin/sh\necho >> {folder}/calls\n{script}\n")
    made.chmod(0o755)
    return str(made)


@pytest.mark.usefixtures("kernels")
def test_it_is_compiled_once_and_kept(said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiler(tmp_path, COMPILES)
    monkeypatch.setenv("CXX", program)
    assert [said(), said()] == ["", ""]
    assert (tmp_path / "calls").read_text() == "\n"
    [kept] = (tmp_path / "cache" / "vecmill" / "kernels").iterdir()
    assert kept.suffix == ".so"
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CXX", f"{program} -DEVERY_ARGUMENT_COUNTS")
    assert said() == ""
    assert (tmp_path / "calls").read_text() == "\n\n"


@pytest.mark.usefixtures("kernels")
def test_it_is_kept_where_the_group_may_write_what_is_new(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """umask 002, which many systems have."""
    monkeypatch.setenv("CXX", compiler(tmp_path, COMPILES))
    before = os.umask(0o002)
    try:
        assert [said(), said()] == ["", ""]
    finally:
        os.umask(before)
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.usefixtures("kernels")
def test_what_has_not_been_used_for_long_is_removed(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "vecmill" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "compiling-by-a-process-that-was-ended").mkdir()
    old = [folder / "old.so", *folder.iterdir()]
    (folder / "recent.so").touch()
    old[0].touch()
    for path in old:
        os.utime(path, (0, 0))
    assert said() == ""
    assert not any(path.exists() for path in old)
    assert (folder / "recent.so").exists()


@pytest.mark.usefixtures("kernels")
def test_what_another_user_may_have_written_is_not_loaded(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, COMPILES))
    assert said() == ""
    [kept] = (tmp_path / "cache" / "vecmill" / "kernels").iterdir()
    kept.unlink()
    kept.write_bytes(b"not a library")
    kept.chmod(0o666)
    assert said() == ""  # compiled anew, in its place
    assert kept.read_bytes().startswith(b"\x7fELF")
    kept.parent.chmod(0o777)
    assert said() == ""  # and elsewhere: what is in this folder may be exchanged at any time
    assert (tmp_path / "calls").read_text() == "\n" * 3


@pytest.mark.usefixtures("kernels")
def test_without_a_cache_it_is_compiled_at_each_start(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("CXX", compiler(tmp_path, COMPILES))
    assert [said(), said()] == ["", ""]
    assert (tmp_path / "calls").read_text() == "\n\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "there is no C++ compiler (/no/such/compiler)"),
        ("echo it is broken >&2; exit 3", "compiler ended with 3: it is broken"),
        ("exit 0", "ended with 1"),  # it made nothing
    ],
)
def test_without_a_compiler_that_works_steps_stay_torchs(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler" if script is None else compiler(tmp_path, script))
    assert why in said()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ('sed "s/const float mean/__builtin_trap(); const float mean/"', "ended with -"),
        ('sed "s/6.9314718e-1f/6.5e-1f/"', "other numbers"),
        ('sed "s/const float mean = .*/const float mean = 0;/"', "other numbers"),
        ('sed "s/const float mean = .*/const float mean = 0.0f \\/ 0.0f;/"', "other numbers"),
        ('sed "s/one \\* load(cos + at/other * load(cos + at/"', "other numbers"),
        ('sed "s/load(turned\\[query\\]/load(turned[0]/"', "other numbers"),
    ],
    ids=["an instruction that the processor lacks", "weights", "norms", "no numbers", "rotations", "biases"],
)
def test_a_library_that_fails_is_not_used(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, why: str
) -> None:
    """Another process tries it first."""
    script = f'for source; do :; done; {change} -i "$source"; exec c++ "$@"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    assert why in said()


@pytest.mark.usefixtures("kernels")
def test_what_gains_nothing_is_not_used(said: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "fastest_in_one_thread", lambda ways, runs: [1.0, 1.1])
    assert "not faster" in said()


@pytest.mark.usefixtures("kernels")
def test_memory_that_ended_while_it_was_tried_says_nothing(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> list[float]:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(cpu_kernels, "fastest_in_one_thread", full)
        with pytest.raises(torch.OutOfMemoryError):
            said()
    assert said() == ""


BUILT_FOR = ["-march=x86-64", "-march=x86-64-v3", "-march=native"]


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flag", BUILT_FOR)
def test_processors_with_narrower_registers_compute_the_same(
    kernels: CpuKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """Without AVX-512, without AVX2: other instructions, and other steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(cpu_kernels.FOR_THIS_PROCESSOR, "x86_64", flag)
    narrow = cpu_kernels._load()
    hidden, weight = values(5, 96), values(96, seed=1)
    torch.testing.assert_close(
        narrow.layer_norm(hidden, weight, weight, 1e-5),
        kernels.layer_norm(hidden, weight, weight, 1e-5),
        rtol=2**-7,
        atol=0,
    )
    rows = places([0, 0], [20, 11]), places([0, 0], [45, 33])
    given = []
    for each in (narrow, kernels):
        scores, sums = 20 * values(3, 2, 1, 20, 48), torch.zeros(3, 2, 1, 20)
        Weigh(each, scores, sums, np.zeros(2, dtype=np.uint8), *rows, (-9, 30))()
        given.append((scores[:, :, :, :11], sums[..., :11]))
    for one, other in zip(*given, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)


def test_clang_compiles_it_too(tmp_path: Path) -> None:
    """With the extensions that both have."""
    source = Path(cpu_kernels.__file__).with_name(cpu_kernels.SOURCE)
    if subprocess.run(["which", "clang++"], capture_output=True).returncode:
        pytest.skip("no clang here")
    subprocess.run(["clang++", *cpu_kernels.FLAGS, "-o", str(tmp_path / "out.so"), str(source)], check=True)
