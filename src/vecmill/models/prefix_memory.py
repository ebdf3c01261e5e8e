"""Keys and values of prefixes, kept as long as rows of their request wait: each is computed once, not once a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vecmill.core.types import Prefix


@dataclass(slots=True)
class PrefixLayers:
    """Keys and values that attention saw of a prefix."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer: (1, kv_heads, tokens, head_dim)."""
    computed: torch.cuda.Event | None = None
    """On CUDA: done once they are there. Only another stream than theirs has to wait for it."""

    def wait(self) -> None:
        """Let the current stream use them only when they are there, and keep their memory until it has."""
        if self.computed is None:
            return
        stream = torch.cuda.current_stream(self.tensors[0][0].device)
        stream.wait_event(self.computed)
        for tensor in (each for layer in self.tensors for each in layer):
            tensor.record_stream(stream)


# Of all prefixes together. A token of Qwen3-Reranker-8B takes 147 kB, so this is 0.6 GB at the most.
MOST_TOKENS = 4096


class PrefixMemory:
    """One model's memory. Belongs to the thread that owns the device; forgets a prefix when its request has ended."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._layers: WeakKeyDictionary[Prefix, PrefixLayers] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Tokens that are kept."""
        return sum(len(prefix) for prefix in list(self._layers))

    def recall(self, prefix: Prefix) -> PrefixLayers | None:
        """What was kept for a prefix."""
        return self._layers.get(prefix)

    def keep(self, prefix: Prefix, layers: PrefixLayers) -> None:
        """Keep what a forward pass computed, where there is room."""
        if layers.tensors and len(self) + len(prefix) <= self._most_tokens:
            self._layers[prefix] = layers
