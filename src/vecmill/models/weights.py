"""Loading weights into a transformers class, with nothing missing and nothing left over."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from vecmill.core.errors import StartupError
from vecmill.models.checkpoint import Checkpoint

# Our own report is stricter than the library's, which warns of what we refuse.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_weights(
    model_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    unused: tuple[str, ...],
    **options: Any,
) -> nn.Module:
    """Load safetensors from the checkpoint's folder; `unused` are prefixes of weights to leave out.

    Raises:
        StartupError: a weight is missing, unknown or of the wrong shape, or a value is not finite.
    """
    try:
        model, info = model_class.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise StartupError(f"EMBED_MODEL={checkpoint.id}: the weights cannot be loaded: {first_line}") from None
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(unused))
    if missing or unexpected or info["mismatched_keys"]:
        raise StartupError(
            f"EMBED_MODEL={checkpoint.id}: the weights do not fit {model_class.__name__}: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unknown {unexpected[:3]}, "
            f"{len(info['mismatched_keys'])} of another shape; fetch the model again."
        )
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise StartupError(f"EMBED_MODEL={checkpoint.id}: weight {name} has values that are not finite.")
    loaded: nn.Module = model.to(device).eval()
    return loaded
