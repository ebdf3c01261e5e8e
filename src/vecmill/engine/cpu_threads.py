"""How many threads a forward pass on a CPU gets: all of them, or one where it is so small that they only wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Tokens at which one thread is tried, smallest first.
TRIED = (16, 32, 64, 128, 256)
# One thread may take so many times as long and is still the better: after a pause the others have to be woken for each
# step (twice the time, on 2 cores), beside a busy program waited for, and left alone they tokenize and answer.
AS_GOOD = 1.4
RUNS = 4


class CpuThreads:
    """The choice for one model. Belongs to the thread that owns the device, whose setting it is."""

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self.single_up_to = 0
        """Tokens of the largest pass that gets one thread."""

    def set_for(self, tokens: int) -> None:
        """Before a pass of so many tokens."""
        wanted = 1 if tokens <= self.single_up_to else self._all
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def restore(self) -> None:
        """All threads again, for whoever comes next."""
        torch.set_num_threads(self._all)

    def measure(self, run: Callable[[int], float], largest: int) -> None:
        """Choose, by the seconds that `run` takes for so many tokens with one thread and with all."""
        if self._all == 1:
            return
        chosen = 0
        for tokens in TRIED:
            if tokens > largest or self._fastest(run, tokens, single=True) > AS_GOOD * self._fastest(
                run, tokens, single=False
            ):
                break
            chosen = tokens
        self.single_up_to = chosen

    def _fastest(self, run: Callable[[int], float], tokens: int, *, single: bool) -> float:
        self.single_up_to = tokens if single else 0
        return min(run(tokens) for _ in range(RUNS))
