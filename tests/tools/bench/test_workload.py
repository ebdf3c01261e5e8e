"""The texts that are sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from vecmill.tools.bench.target import BenchError, BenchTarget
from vecmill.tools.bench.workload import payloads, read_workload, text_chunks, text_files


def test_the_built_in_texts_are_python_and_always_the_same() -> None:
    first = read_workload(None, 60)
    assert first == read_workload(None, 60)
    assert len(set(first.texts)) > 50
    assert all(0 < len(text) <= 1500 for text in first.texts)
    assert any(text.lstrip().startswith(("def ", "async def ", "class ", "@")) for text in first.texts)


def test_texts_are_no_longer_than_asked() -> None:
    assert max(map(len, read_workload(None, 60, longest=120).texts)) <= 120


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    kept = tmp_path / "a.py"
    kept.write_text("x = 1\n", "utf-8")
    (tmp_path / "binary").write_bytes(b"\x00\x01")
    (tmp_path / "latin").write_bytes(b"\xff\xfe caf\xe9")
    (tmp_path / ".hidden").write_text("secret", "utf-8")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "huge").write_bytes(b"x" * 1_000_001)
    (tmp_path / "link").symlink_to(kept)
    for folder in (".git", "node_modules", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("left out", "utf-8")
    assert [path.name for path in text_files(tmp_path)] == ["a.py", "binary", "latin"]
    assert set(read_workload(tmp_path, 5).texts) == {"x = 1"}


def test_a_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "text"
    lines = [f"line {number} {'x' * (number % 70)}" for number in range(400)]
    path.write_text("\n".join(lines), "utf-8")
    pieces = list(text_chunks(path, 1500))
    assert "\n".join(pieces).split("\n") == lines
    assert all(1000 <= len(piece) <= 1500 for piece in pieces[:-1])


def test_a_line_without_end_is_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "line"
    path.write_text("x" * 250, "utf-8")
    assert [len(piece) for piece in text_chunks(path, 100)] == [100, 100, 50]


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no text files"):
        read_workload(tmp_path, 1)


def test_requests_hold_a_batch_each() -> None:
    requests = payloads(BenchTarget("host"), ["a", "b", "ü"], 2)
    assert [(request.texts, request.text_bytes) for request in requests] == [(2, 2), (1, 2)]
