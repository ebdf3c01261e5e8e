"""What runs a family on the device: packed token ids in, a vector for each text or a logit for each pair out.

The families' specs name the classes of transformers; here they become models that take a `PackedBatch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vecmill.core.errors import StartupError
from vecmill.models.bert import activation
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.config_keys import ACTIVATIONS
from vecmill.models.family import Pooling, Positions
from vecmill.models.heads import load_heads
from vecmill.models.latent_attention import LatentAttention
from vecmill.models.packing import PackedBatch
from vecmill.models.rerank_prompt import Answers, rerank_form
from vecmill.models.token_table import TableConfig, TokenTable
from vecmill.models.weights import Target, WeightFiles, load_weights, make_config

HEAD = "lm_head.weight"
SCORES = ("score.weight", "language_model.score.weight")
TWO_LABELS = ("head.weight", "head.bias")
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")


class Backbone:
    """A network without its head, run on packed rows."""

    def __init__(self, checkpoint: Checkpoint, config: Any, module: Any) -> None:
        """`module`: what `load_weights` gave, or the part of it that ends with the last hidden states."""
        self.module = module
        self.vocab_size: int = config.vocab_size
        self.layers: Sequence[nn.Module] = tuple(attrgetter(checkpoint.network.blocks)(module))
        self._token_types = checkpoint.network.token_types
        after_padding = checkpoint.family.positions is Positions.AFTER_PADDING
        self._padding = int(config.pad_token_id) if after_padding else None

    def hidden_states(self, packed: PackedBatch) -> Tensor:
        """(T, hidden size) of the last layer, after its norm."""
        hidden: Tensor = self.module(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids if self._padding is None else positions(packed, self._padding),
            packed_batch=packed,
            **({"token_type_ids": packed.token_type_ids} if self._token_types else {}),
        ).last_hidden_state[0]
        return hidden


def sizes(checkpoint: Checkpoint) -> Any:
    """An object with `vocab_size` and `hidden_size`, from config.json or, where there is none, from the weights.

    Raises:
        StartupError: they cannot be right.
    """
    return TableConfig.of(checkpoint) if checkpoint.network.token_table else make_config(checkpoint)


def load_model(checkpoint: Checkpoint, target: Target) -> Model:
    """The model of a checkpoint, its weights on the target's device.

    Raises:
        StartupError: a weight is missing, unknown or of the wrong shape, or transformers refuses config.json.
    """
    if checkpoint.network.token_table:
        return StaticModel(checkpoint, target)
    if checkpoint.pools:
        return EmbeddingModel(checkpoint, target)
    return DecoderReranker(checkpoint, target) if checkpoint.family.is_decoder else CrossEncoder(checkpoint, target)


class Model(ABC):
    """A loaded model: packed token ids in, vectors or logits out."""

    width: int
    """Values per row: the dimensions of a vector, or 1 for a reranker's logit."""

    layers: Sequence[nn.Module]
    """The repeated transformer blocks, in the order they run, all of one class; none where there is no transformer."""
    modules: Sequence[nn.Module]
    """All that holds weights."""
    vocab_size: int

    @property
    def largest_head(self) -> int:
        """Values of a head of attention at most; 0 where the layers do not say."""
        modules = (module for layer in self.layers for module in layer.modules())
        return max((int(getattr(module, "head_dim", None) or 0) for module in modules), default=0)

    def forward(self, packed: PackedBatch) -> Tensor:
        """(N, width) float32, not normalised, in packed order."""
        return self.finish(self.pooled(packed))

    @abstractmethod
    def pooled(self, packed: PackedBatch) -> Tensor:
        """(N, hidden size) float32, in packed order: what the last heads are given of each row."""

    @abstractmethod
    def finish(self, pooled: Tensor) -> Tensor:
        """What `forward` gives for what was pooled."""


def tensors_of(model: Model) -> dict[int, Tensor]:
    """All that a model holds, by `id`: parameters, buffers, and what is kept beside them."""
    owners = [vars(model), *(place for module in model.modules for part in module.modules() for place in _places(part))]
    return {id(value): value for owner in owners for value in owner.values() if isinstance(value, Tensor)}


def move_tensors(model: Model, device: torch.device, but: Collection[int] = ()) -> None:
    """Put all that a model holds on a device, but tensors of these `id`s.

    In place: who shares a module with it has the moved one, too. All is copied before the first tensor is exchanged, so
    that a device without room leaves the model as it was.
    """
    moving = [tensor for key, tensor in tensors_of(model).items() if key not in but and tensor.device != device]
    copies = [tensor.data.to(device) for tensor in moving]
    for tensor, copy in zip(moving, copies, strict=True):
        tensor.data = copy


def places_within(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each module below `modules`: its parent, its name there, and itself; once for each name that it has."""
    for parent in dict.fromkeys(each for module in modules for each in module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                yield parent, name, child


def replace_modules(modules: Iterable[nn.Module], made: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange the modules within `modules` that are keys of `made` for their values, wherever they are."""
    for parent, name, child in places_within(modules):
        if child in made:
            setattr(parent, name, made[child])


def _places(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, vars(module)


class TransformerModel(Model):
    """One with a transformer."""

    def __init__(self, backbone: Backbone, *others: nn.Module) -> None:
        """`others`: all else that holds weights."""
        self._backbone = backbone
        self.vocab_size = backbone.vocab_size
        self.layers = backbone.layers
        self.modules = (backbone.module, *others)


class StaticModel(Model):
    """One vector per text: the mean of its tokens', which are in a table."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        self._table = TokenTable.load(checkpoint, target)
        self._heads = load_heads(checkpoint, checkpoint.of_vectors, target)
        self.width = checkpoint.width_after_heads(self._table.weight.shape[1])
        self.vocab_size, self.layers = self._table.vocab_size, self._table.layers
        self.modules = (self._table, self._heads)

    def pooled(self, packed: PackedBatch) -> Tensor:
        """(N, width of the table) float32, in packed order."""
        means: Tensor = self._table(packed)
        return means

    def finish(self, pooled: Tensor) -> Tensor:
        """(N, width) float32, not normalised."""
        vectors: Tensor = self._heads(pooled)
        return vectors


class EmbeddingModel(TransformerModel):
    """One vector per text, or of a vector per pair the one number that its last head makes of it."""

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        config, network = make_config(checkpoint), checkpoint.network
        self.width = checkpoint.width_after_heads(getattr(config, checkpoint.family.width_key))
        backbone = Backbone(checkpoint, config, load_weights(checkpoint, config, target))
        self._pooling = network.pooling or checkpoint.require_pooling()
        self._latent_attention: LatentAttention | None = None
        if network.latent_attention is not None:
            sizes = checkpoint.config.get(network.latent_attention) or {}
            self._latent_attention = LatentAttention.fold(WeightFiles(checkpoint), sizes, target)
        self._of_tokens = load_heads(checkpoint, checkpoint.of_tokens, target)
        self._of_vectors = load_heads(checkpoint, checkpoint.of_vectors, target)
        others = [self._latent_attention, self._of_tokens, self._of_vectors]
        super().__init__(backbone, *(module for module in others if module is not None))

    def pooled(self, packed: PackedBatch) -> Tensor:
        """(N, hidden size) float32, in packed order."""
        hidden = self._backbone.hidden_states(packed)
        if self._latent_attention is not None:
            hidden = self._latent_attention(hidden)
        if len(self._of_tokens):
            hidden = self._of_tokens(hidden.float())
        return pool(hidden, packed, self._pooling)

    def finish(self, pooled: Tensor) -> Tensor:
        """(N, width) float32, not normalised."""
        vectors: Tensor = self._of_vectors(pooled)
        return vectors


class CrossEncoder(TransformerModel):
    """An encoder and its classification head: one logit per pair of query and document."""

    width = 1

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        config = make_config(checkpoint)
        model = load_weights(checkpoint, config, target)
        if not hasattr(model, "pair_head"):  # a model that is shared has one already
            model.pair_head = _head(model, checkpoint.network.head)
        self._head: nn.Module = model.pair_head
        self._pooling = checkpoint.network.head_pooling(checkpoint.config)
        encoder = model.base_model
        super().__init__(Backbone(checkpoint, config, encoder), self._head)

    def pooled(self, packed: PackedBatch) -> Tensor:
        """(N, hidden size) float32, in packed order."""
        return pool(self._backbone.hidden_states(packed), packed, self._pooling)

    def finish(self, pooled: Tensor) -> Tensor:
        """(N, 1) float32 logits."""
        logits: Tensor = self._head(pooled[:, None])  # some heads take the first token of (N, 1, width) by themselves
        return logits.view(-1, 1)


def _head(model: Any, parts: Sequence[str]) -> nn.Module:
    """The modules of a classification head, in float32 whatever the weights' type; the encoder goes without them."""
    head = nn.Sequential(
        *(activation(part) if part in ACTIVATIONS else attrgetter(part)(model) for part in parts)
    ).float()
    if getattr(model.base_model, "pooler", None) is not None:
        model.base_model.pooler = None
    return head


class DecoderReranker(TransformerModel):
    """A language model; of its head the one row, or the difference of two, that makes the score of what is pooled."""

    width = 1

    def __init__(self, checkpoint: Checkpoint, target: Target) -> None:
        config = make_config(checkpoint)
        super().__init__(Backbone(checkpoint, config, load_weights(checkpoint, config, target)))
        answers = rerank_form(checkpoint).answers
        weights, bias = WeightFiles(checkpoint), torch.zeros(1)
        if answers is not None:
            row = _logit(checkpoint, weights, config, answers)
        elif checkpoint.family.has_two_label_head(checkpoint.config):
            row, bias = _two_labels(checkpoint, weights, config)
        else:
            row = _score(checkpoint, weights, config)
        self._row, self._bias = row.to(target.device), bias.to(target.device)
        self._pooling: Pooling = checkpoint.network.pooling or "lasttoken"

    def pooled(self, packed: PackedBatch) -> Tensor:
        """(N, hidden size) float32, in packed order."""
        return pool(self._backbone.hidden_states(packed), packed, self._pooling)

    def finish(self, pooled: Tensor) -> Tensor:
        """(N, 1) float32 logits."""
        # Row by row, so that a score does not depend on how many others there are.
        return torch.sum(pooled * self._row, dim=1, keepdim=True) + self._bias


def _logit(checkpoint: Checkpoint, weights: WeightFiles, config: Any, answers: Answers) -> Tensor:
    """(hidden,) such that h . row = scale * (log p(true) - log p(false)), or the logit of `true` alone."""
    tokens = [answers.true] if answers.false is None else [answers.true, answers.false]
    if max(tokens) >= config.vocab_size:
        raise StartupError(f"{checkpoint.named}: the tokens of its answers {tokens} are not in its vocabulary.")
    # Qwen3's 8B stores its head; the smaller ones use their token embedding for it. One that is stored counts always.
    head = HEAD
    if HEAD not in weights.files and config.tie_word_embeddings:
        head = next((name for name in EMBEDDINGS if name in weights.files), EMBEDDINGS[0])
    true, *false = (weights.part(head, slice(token, token + 1))[0] for token in tokens)
    return answers.scale * (true - false[0] if false else true)


def _two_labels(checkpoint: Checkpoint, weights: WeightFiles, config: Any) -> tuple[Tensor, Tensor]:
    """(hidden,) and (1,) of a head of two labels: the second's logit less the first's."""
    if tuple(shape := weights.shape(TWO_LABELS[0])) != (2, config.hidden_size):
        raise weights.unfit(f"{TWO_LABELS[0]} has the shape {tuple(shape)} instead of {(2, config.hidden_size)}")
    weight, bias = (weights.part(name) for name in TWO_LABELS)
    return weight[1] - weight[0], (bias[1] - bias[0])[None]


def _score(checkpoint: Checkpoint, weights: WeightFiles, config: Any) -> Tensor:
    """(hidden,) of a classification head."""
    labels, name = config.num_labels, next((name for name in SCORES if name in weights.files), SCORES[0])
    stored = weights.shape(name)[0] if name in weights.files else labels
    if (labels, stored) != (1, 1):
        raise StartupError(
            f"{checkpoint.named}: its head has {stored} labels, and config.json has {labels} (`id2label`, else 2); a "
            f'reranker has one (a relevance score). Where the head has one, set `id2label` to {{"0": "LABEL_0"}}.'
        )
    divisor = checkpoint.network.score_divisor
    return weights.part(name)[0] / float(checkpoint.config.get(divisor) or 1.0 if divisor else 1.0)


def positions(packed: PackedBatch, padding: int) -> Tensor:
    """(1, T) positions that begin after the padding's id; padding written in a text is not counted (XLM-R).

    Such a token has the padding's own position, as transformers computes it.
    """
    index = torch.arange(packed.position_ids.shape[1], device=packed.position_ids.device)
    is_padding = packed.input_ids[0] == padding
    before = torch.cumsum(is_padding, 0) - is_padding.long()
    of_row = before - before[index - packed.position_ids[0]]
    counted = packed.position_ids[0] - of_row + padding + 1
    return torch.where(is_padding, padding, counted)[None]


def pool(hidden: Tensor, packed: PackedBatch, mode: Pooling) -> Tensor:
    """(T, width) token vectors of any dtype -> (N, width) float32, in packed order."""
    if mode == "cls":
        return hidden[packed.first].float()
    if mode == "lasttoken":
        return hidden[packed.last].float()
    return mean(hidden, packed)


def mean(hidden: Tensor, packed: PackedBatch) -> Tensor:
    """Mean over the tokens of each row that are pooled; each row is summed by itself, whatever it was packed with.

    A row of which none is pooled gives NaN.
    """
    vectors, counts = hidden.float(), packed.lengths.float()
    if packed.pooled is not None:
        vectors = vectors * packed.pooled
        counts = torch.segment_reduce(packed.pooled[:, 0], "sum", lengths=packed.lengths, unsafe=True)
    sums = torch.segment_reduce(vectors, "sum", lengths=packed.lengths, axis=0, unsafe=True)
    return sums[packed.segments] / counts[packed.segments, None]
