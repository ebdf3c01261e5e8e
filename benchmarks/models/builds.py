"""The families' models with random weights: vecmill's own classes, no checkpoint fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.models.shapes import Shape
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MistralConfig,
    MistralModel,
    MPNetConfig,
    MPNetModel,
    NomicBertConfig,
    NomicBertModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.initialization import no_init_weights

from vecmill.core.types import Task
from vecmill.models import bert
from vecmill.models.checkpoint import Checkpoint, Source
from vecmill.models.families import FAMILIES
from vecmill.models.family import Family, Pooling
from vecmill.models.latent_attention import LatentAttention
from vecmill.models.merged_projections import Rows, merge_projections
from vecmill.models.networks import Model, load_model
from vecmill.models.tokenizer_files import TokenizerSettings
from vecmill.models.transformers_networks import ATTENTION
from vecmill.models.weights import Target, WeightFiles

SEED = 26
BLOCK = 2**22 - 3  # a prime, so that no two rows of a matrix get the same values
RERANKER = "qwen3-reranker"
OF_OTHER_FORM = frozenset({"bert", "mpnet"})
"""The kinds for `build_beside_plain`."""
POOLINGS: Mapping[str, Pooling] = {"bert": "mean", "mpnet": "mean", "qwen3": "lasttoken", "nvembed": "mean"}
ANSWERS = {"true_token_id": 0, "false_token_id": 1}


class RandomValues:
    """Normal values of which one block is drawn and repeated: billions would take minutes on a CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(SEED)
        self._block = torch.randn(BLOCK, generator=generator, device=device).to(dtype)
        self._next = 0

    def tensor(self, shape: Sequence[int], std: float = 1.0, mean: float = 0.0) -> Tensor:
        """The next values, in this shape."""
        values = self._block.new_empty(math.prod(shape))
        filled = 0
        while filled < len(values):
            part = self._block[self._next : self._next + len(values) - filled]
            values[filled : filled + len(part)] = part
            filled += len(part)
            self._next = (self._next + len(part)) % BLOCK
        return values.view(*shape).mul_(std).add_(mean)

    def parameter(self, name: str, shape: Sequence[int]) -> Tensor:
        """Values that keep a model's hidden states near 1: norms near 1, biases near 0, linear layers by width."""
        if len(shape) == 1:
            return self.tensor(shape, 0.1, 1.0 if name.endswith("weight") else 0.0)
        return self.tensor(shape, 1.0 if "embed" in name else shape[-1] ** -0.5)


def build(kind: str, shape: Shape, target: Target, folder: Path) -> Model:
    """A model as vecmill loads it.

    It finds its backbone already loaded, as it does for a folder that is named twice; what else it
    reads (the reranker's head, NV-Embed's latents) is written to `folder`.
    """
    checkpoint = _checkpoint(kind, shape, folder)
    backbone = _backbone(kind, shape, target)
    target.shared[checkpoint.folder.resolve(), checkpoint.network.model_class] = backbone
    if kind == RERANKER:
        head = RandomValues(torch.device("cpu"), target.dtype).tensor((2, shape["hidden_size"]))
        save_file({"lm_head.weight": head}, folder / "model.safetensors")
    if kind == "nvembed":
        write_latents(folder, shape["hidden_size"], shape["latent_attention_config"], target.dtype)
    return load_model(checkpoint, target)


def build_beside_plain(kind: str, shape: Shape, target: Target, folder: Path) -> tuple[Model, nn.Module]:
    """A model as vecmill loads it from files, and transformers' own class with the same weights.

    For families whose layers vecmill has in another form, so that no module can be on both sides.
    """
    plain: nn.Module = {"bert": _bert, "mpnet": _mpnet}[kind](shape)
    _filled(plain, target)
    save_file({name: value.contiguous() for name, value in plain.named_parameters()}, folder / "model.safetensors")
    return load_model(_checkpoint(kind, shape, folder), target), plain


def _bert(shape: Shape) -> nn.Module:
    with no_init_weights():
        model: nn.Module = BertModel(BertConfig(**shape), add_pooling_layer=False)
    return model


def _mpnet(shape: Shape) -> nn.Module:
    with no_init_weights():
        model: nn.Module = MPNetModel(MPNetConfig(**shape), add_pooling_layer=False)
    return model


def build_latents(width: int, latent_config: Shape, target: Target, folder: Path) -> LatentAttention:
    """NV-Embed's latent attention alone, folded from what is written to `folder`."""
    write_latents(folder, width, latent_config, target.dtype)
    return LatentAttention.fold(WeightFiles(_checkpoint("nvembed", {}, folder)), latent_config, target)


def _checkpoint(kind: str, shape: Shape, folder: Path) -> Checkpoint:
    reranks = kind == RERANKER
    text = {"text_config": {**shape["text_config"], "model_type": "mistral"}} if "text_config" in shape else {}
    return Checkpoint(
        source=Source("Qwen3-Reranker-0.6B" if reranks else kind, folder, Task.RERANK if reranks else Task.EMBED),
        family=_family(kind),
        config={**shape, **text, "model_type": _family(kind).model_type},
        pooling=POOLINGS.get(kind),
        positions=32768,
        max_model_len=32768,
        library_config={},
        include_prompt=True,
        tokenizer=TokenizerSettings(None, lower_case=False),
        logit_score=ANSWERS if reranks else {},
    )


def _family(kind: str) -> Family:
    return FAMILIES["qwen3" if kind == RERANKER else kind]


def _merge(kind: str, model: nn.Module) -> Mapping[str, Rows]:
    return merge_projections(model, _family(kind).tasks[Task.EMBED].network.merged)


def _backbone(kind: str, shape: Shape, target: Target) -> nn.Module:
    model = _unfilled(kind, shape)
    _merge(kind, model)
    return _filled(model, target)


def merged_and_separate(kind: str, shape: Shape, target: Target) -> tuple[nn.Module, nn.Module]:
    """The same backbone with its projections merged, as it is loaded, and as transformers has it."""
    separate = _filled(_unfilled(kind, shape), target)
    merged = _unfilled(kind, shape)
    places = _merge(kind, merged)
    merged = _filled(merged, target)
    parameters = dict(merged.named_parameters())
    for name, value in separate.named_parameters():
        place = places.get(name)
        whole = parameters[place.parameter if place else name]
        (whole.data[place.start : place.stop] if place else whole.data).copy_(value)
    return merged, separate


def _unfilled(kind: str, shape: Shape) -> nn.Module:
    model: Any
    with no_init_weights():
        if kind == "bert":
            return bert.BertModel(bert.BertConfig.of(shape), add_pooling_layer=False)
        if kind == "nvembed":
            config = MistralConfig(**shape["text_config"], sliding_window=None, use_cache=False)
            config.is_causal = False
            model = MistralModel(config)
        elif kind == "nomic_bert":
            model = NomicBertModel(NomicBertConfig(**shape), add_pooling_layer=False)
        else:
            model = Qwen3Model(Qwen3Config(**shape, use_cache=False))
    model.set_attn_implementation(ATTENTION)
    unfilled: nn.Module = model
    return unfilled


def _filled(model: nn.Module, target: Target) -> nn.Module:
    fill(model, RandomValues(target.device, target.dtype))
    return model.to(target.device).eval()  # the buffers


def fill(model: nn.Module, values: RandomValues) -> None:
    """Replace every parameter; those of `no_init_weights` were never written, so they took no memory."""
    for name, old in list(model.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        new = nn.Parameter(values.parameter(name, old.shape), requires_grad=False)
        setattr(model.get_submodule(module_name), leaf, new)


def write_latents(folder: Path, width: int, latent_config: Shape, dtype: torch.dtype) -> None:
    """NV-Embed's latent attention under the hub's names, as the one file of `folder`."""
    inner = latent_config["num_cross_heads"] * latent_config["cross_dim_head"]
    attention, feed_forward = (f"latent_attention_model.cross_attend_blocks.{block}." for block in (0, 1))
    shapes = {
        attention + "norm.weight": (width,),
        attention + "norm.bias": (width,),
        attention + "norm_context.weight": (width,),
        attention + "norm_context.bias": (width,),
        attention + "fn.to_q.weight": (inner, width),
        attention + "fn.to_kv.weight": (2 * inner, width),
        attention + "fn.to_out.weight": (width, inner),
        feed_forward + "norm.weight": (width,),
        feed_forward + "norm.bias": (width,),
        feed_forward + "fn.net.0.weight": (8 * width, width),
        feed_forward + "fn.net.0.bias": (8 * width,),
        feed_forward + "fn.net.2.weight": (width, 4 * width),
        feed_forward + "fn.net.2.bias": (width,),
    }
    values = RandomValues(torch.device("cpu"), dtype)
    tensors = {name: values.parameter(name, shape) for name, shape in shapes.items()}
    latents = values.tensor((latent_config["num_latents_value"], width))
    save_file({"latent_attention_model.latents": latents, **tensors}, folder / "model.safetensors")


def matmul_parameters(modules: Sequence[nn.Module]) -> int:
    """Values of all matrices that hidden states are multiplied with; a token embedding is only looked up."""
    embeddings = {id(each.weight) for module in modules for each in module.modules() if isinstance(each, nn.Embedding)}
    parameters = {id(each): each for module in modules for each in module.parameters()}
    return sum(each.numel() for key, each in parameters.items() if each.dim() == 2 and key not in embeddings)
