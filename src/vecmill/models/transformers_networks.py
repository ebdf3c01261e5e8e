"""Networks of transformers' classes, without weights, and those of this package that are built on them.

`weights` imports this where a checkpoint needs it: transformers takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from vecmill.models.adapters import AdaptedEncoder
from vecmill.models.biased_layers import with_bias
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.jina_bert import JinaBert, JinaBertForPairs
from vecmill.models.nomic_layers import NomicBert
from vecmill.models.packed_attention import packed_attention

transformers_logging.set_verbosity_error()

# transformers builds no mask for a name it has no mask function for, and hands extra forward arguments down to the
# attention function: `packed_batch` travels that way.
ATTENTION = "packed"
AttentionInterface.register(ATTENTION, packed_attention)

# Networks that transformers has no class for.
OWN_CLASSES: Mapping[str, type[nn.Module]] = {each.__name__: each for each in (NomicBert, JinaBert, JinaBertForPairs)}


def is_of_transformers(name: str) -> bool:
    """Whether transformers has a class of this name, which would read and write such a checkpoint."""
    return name not in OWN_CLASSES and name != AdaptedEncoder.__name__


def make_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a checkpoint's network. Raises whatever the class raises for what it does not accept."""
    return getattr(transformers, checkpoint.network.config_class)(**checkpoint.arguments)


def make_model(checkpoint: Checkpoint, config: Any) -> nn.Module:
    """The network, whose weights are allocated and not written. Raises whatever the class raises."""
    name = checkpoint.network.model_class
    model_class = OWN_CLASSES[name] if name in OWN_CLASSES else getattr(transformers, name)
    with no_init_weights():  # allocated and never written: takes no memory before the real weights replace it
        model: nn.Module = model_class(config, **checkpoint.network.options)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return model if checkpoint.adapters is None else AdaptedEncoder(model, checkpoint.adapters)


def complete(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """What remains to be done of a network once its weights are there."""
    if isinstance(model, AdaptedEncoder):
        model.join_adapters()
    bias = checkpoint.network.position_bias
    return model if bias is None else with_bias(model, bias)
