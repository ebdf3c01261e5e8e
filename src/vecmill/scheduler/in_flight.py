"""The batches that the runner has been given."""

from __future__ import annotations

from collections import Counter

from vecmill.core.types import Lane


class InFlight:
    """One batch on the device and those behind it, of which the runner takes interactive ones first."""

    def __init__(self) -> None:
        self._behind: Counter[Lane] = Counter()
        self._busy = False

    def begin(self, lane: Lane) -> None:
        """A batch is given to the runner."""
        if self._busy:
            self._behind[lane] += 1
        self._busy = True

    def end(self) -> None:
        """The batch on the device is answered; the next one takes its place."""
        following = next((lane for lane in Lane if self._behind[lane]), None)
        if following is None:
            self._busy = False
        else:
            self._behind[following] -= 1

    def has_room(self, *, full: bool, interactive: bool) -> bool:
        """Whether to cut a batch now: as late as possible, for what arrives meanwhile still gets into it.

        An idle device takes anything. Behind a busy one goes a batch that is `full`, which gains nothing by waiting;
        and behind bulk alone one with `interactive` texts, to overtake it.
        """
        if not self._busy:
            return True
        if not self._behind.total():
            return full
        return interactive and not self._behind[Lane.INTERACTIVE]
