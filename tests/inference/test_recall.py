"""What is remembered of texts is bounded, and what is asked for stays."""

from __future__ import annotations

from vecmill.inference.recall import Known, TextMemory


def known(number: int) -> Known:
    return Known(number.to_bytes(16, "little"), number, truncated=False)


def test_the_memory_is_bounded_and_keeps_what_is_asked_for() -> None:
    memory = TextMemory(most=100)
    for number in range(1000):
        memory.add(b"%d" % number, known(number))
        assert memory.get(b"0") == known(0)
        assert len(memory) <= 101
    assert memory.get(b"999") == known(999)
    assert memory.get(b"500") is None
