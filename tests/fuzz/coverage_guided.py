"""Searches with Atheris, which goes where new code is reached: `make fuzz-coverage`.

    python -m tests.fuzz.coverage_guided TARGET SECONDS [CORPUS]

What was found interesting is kept in the folder CORPUS, where the next search goes on. An input that breaks a promise
is written to the current folder as `found-TARGET`, and ends the search. Each round is a process of its own, since
Atheris keeps some of the memory of every input. It is imported here alone.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LONGEST = 65_536  # bytes of an input
CHANGED_HERE = 0.5  # of the inputs; the others are changed by libFuzzer
ROUND_SECONDS = 120


def main(name: str, seconds: int, corpus: Path) -> None:
    """Search for so long, or until something is found: then the status of the process is not 0."""
    ends = time.monotonic() + seconds
    while (left := round(ends - time.monotonic())) > 0:
        arguments = [name, str(min(left, ROUND_SECONDS)), str(corpus), "round"]
        if status := subprocess.run(
            [sys.executable, "-m", "tests.fuzz.coverage_guided", *arguments], check=False
        ).returncode:
            sys.exit(status)


def search(name: str, seconds: int, corpus: Path) -> None:
    """One round. Does not return."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not among the development tools

    with atheris.instrument_imports(include=["vecmill"], enable_loader_override=False):
        from tests.fuzz import targets
    from tests.fuzz.mutation import mutated

    target = targets.TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < CHANGED_HERE:
            return mutated(data, target.words, source)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            Path(f"found-{name}").write_bytes(data)
            raise

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=4000"]
    with tempfile.NamedTemporaryFile("wb", suffix=".dict") as words:
        words.writelines(b'"' + b"".join(b"\\x%02x" % byte for byte in word) + b'"\n' for word in target.words)
        words.flush()
        arguments = [sys.argv[0], str(corpus), *options, f"-dict={words.name}", "-print_final_stats=1"]
        atheris.Setup(arguments, run, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    chosen, duration, *rest = sys.argv[1:]
    do = search if rest[1:] == ["round"] else main
    do(chosen, int(duration), Path(rest[0] if rest else f".fuzz/corpus/{chosen}"))
