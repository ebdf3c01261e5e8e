"""What a page of Markdown holds: fenced blocks, code spans, links, headings."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^\s*```(\w*)$")
HEADING = re.compile(r"^#+ (.+)$", re.M)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence, from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


class Page:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks: list[Block] = []
        prose: list[str] = []
        opened: tuple[int, str] | None = None
        held: list[str] = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            fence = FENCE.match(line)
            if fence and opened:
                self.blocks.append(Block(path, opened[0], opened[1], "".join(held)))
                opened = None
            elif fence:
                opened, held = (number, fence[1]), []
            elif opened:
                held.append(f"{line}\n")
            else:
                prose.append(line)
        assert opened is None, f"{path.name}:{opened}: the block has no end"
        self._prose = "\n".join(prose)

    @property
    def spans(self) -> list[str]:
        """`code` in the prose; a line break in it is a space."""
        return [span.replace("\n", " ") for span in SPAN.findall(self._prose)]

    @property
    def links(self) -> list[str]:
        """Where the links lead."""
        return LINK.findall(SPAN.sub("", self._prose))

    @property
    def anchors(self) -> set[str]:
        """What a link's `#...` may say, as GitHub makes it of the headings."""
        seen: Counter[str] = Counter()
        anchors = set()
        for heading in HEADING.findall(self._prose):
            name = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
            anchors.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
        return anchors
