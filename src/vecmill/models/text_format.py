"""How a family's texts are put into tokens where tokenizer.json alone does not say. Reads no tensors.

Source: https://huggingface.co/nvidia/NV-Embed-v2.
"""

from __future__ import annotations

from dataclasses import dataclass

from vecmill.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What an embedder's tokens need beyond the tokenizer's own template."""

    end_token: str | None = None
    """Ends every text; added where the template does not add it."""
    end_survives_truncation: bool = True
    instruction_unpooled: bool = False
    """The mean leaves out as many leading tokens as the prompt has by itself."""


def text_format(checkpoint: Checkpoint) -> TextFormat:
    """The format of a checkpoint's family."""
    if checkpoint.model_type == "nvembed":  # its reference appends the end as text and then cuts on the right
        unpooled = bool(checkpoint.config.get("is_mask_instruction", True))
        return TextFormat("</s>", end_survives_truncation=False, instruction_unpooled=unpooled)
    return TextFormat()
