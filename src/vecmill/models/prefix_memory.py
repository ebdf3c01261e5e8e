"""Keys and values of prefixes, kept as long as rows of their request wait: each is computed once, not once a batch."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from vecmill.core.types import Prefix

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer: (1, kv_heads, tokens, head_dim)."""

# Of all prefixes together. A token of Qwen3-Reranker-8B takes 147 kB, so this is 0.6 GB at the most.
MOST_TOKENS = 4096


class PrefixMemory:
    """One model's memory. Belongs to the thread that owns the device; forgets a prefix when its request has ended."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._layers: WeakKeyDictionary[Prefix, Layers] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Tokens that are kept."""
        return sum(len(prefix) for prefix in list(self._layers))

    def recall(self, prefix: Prefix) -> Layers | None:
        """What was kept for a prefix."""
        return self._layers.get(prefix)

    def keep(self, prefix: Prefix, layers: Layers) -> None:
        """Keep what a forward pass computed, where there is room."""
        if layers and len(self) + len(prefix) <= self._most_tokens:
            self._layers[prefix] = layers
