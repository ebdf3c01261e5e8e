"""How a family's texts are put into tokens where tokenizer.json alone does not say. Reads no tensors.

Source: https://huggingface.co/nvidia/NV-Embed-v2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vecmill.models.checkpoint import Checkpoint

Unpooled = Literal["nothing", "instruction", "prompt"]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What an embedder's tokens need beyond the tokenizer's own template."""

    end_token: str | None = None
    """Ends every text; added where the template does not add it."""
    end_survives_truncation: bool = True
    unpooled: Unpooled = "nothing"
    """Which leading tokens are not pooled: as many as the prompt has by itself (`instruction`, NV-Embed), or as many as
    it has with the special tokens around it, less an ending one (`prompt`, sentence-transformers' `include_prompt`)."""


def text_format(checkpoint: Checkpoint) -> TextFormat:
    """The format of a checkpoint's family."""
    unpooled: Unpooled = "nothing" if checkpoint.include_prompt else "prompt"
    if checkpoint.model_type == "nvembed":  # its reference appends the end as text and then cuts on the right
        unpooled = "instruction" if checkpoint.config.get("is_mask_instruction", True) else "nothing"
        return TextFormat("</s>", end_survives_truncation=False, unpooled=unpooled)
    return TextFormat(unpooled=unpooled)
