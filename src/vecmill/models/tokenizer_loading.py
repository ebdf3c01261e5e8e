"""A checkpoint's tokenizer, as transformers makes it of the folder's files.

transformers 5 makes many tokenizers anew from vocabulary and settings, and so does not always do what tokenizer.json
says: a BERT's is put in lower case by tokenizer_config.json. So the tokenizer is what transformers makes, handed on as
the `tokenizers` library's own JSON. Where the files leave no doubt what that would be, it is not asked: importing it
takes seconds (`bert_tokenizer`). Nothing is downloaded, and no code of the checkpoint's is run.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from tokenizers import Tokenizer, normalizers

from vecmill.core.errors import StartupError, first_line
from vecmill.core.types import Side, Task
from vecmill.models.bert_tokenizer import plain_bert
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import check_special_tokens, rerank_form
from vecmill.models.tokenizer_files import ReadTokenizer, Template, panics_refused, read_file, template

# A character that no vocabulary has (of Unicode's private use), and a word that is too long for one.
UNKNOWN_WORDS = ["\ue000", "x" * 1000]


def load_tokenizer(checkpoint: Checkpoint) -> ReadTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        StartupError: transformers makes none of the files, or one that cannot be run here.
    """
    with panics_refused(checkpoint.tokenizer_file):
        return _load_tokenizer(checkpoint)


def _load_tokenizer(checkpoint: Checkpoint) -> ReadTokenizer:
    file = checkpoint.tokenizer_file
    if checkpoint.network.token_table:
        return _bare(checkpoint)
    if checkpoint.family.tokenizer_as_it_stands:
        return read_file(file)
    tokenizer: Any = plain_bert(checkpoint) or _of_transformers(checkpoint)
    if not file.is_file():  # for errors
        file = checkpoint.folder
    backend = tokenizer.backend_tokenizer
    if checkpoint.tokenizer.lower_case:
        backend.normalizer = _lower_case_first(backend.normalizer)
    _check_model(checkpoint, backend)
    types = "token_type_ids" in tokenizer.model_input_names
    pairs = checkpoint.task is Task.RERANK and not _has_prompt(checkpoint)
    around_pair = template(file, backend, pair=True, token_types=types) if pairs else None
    read = ReadTokenizer(
        file,
        backend.to_str(),
        template(file, backend, pair=False, token_types=types),
        around_pair,
        Side(tokenizer.truncation_side),
        bool(tokenizer.split_special_tokens) or checkpoint.messages.splits_special_tokens,
    )
    _check_sides(checkpoint, tokenizer)
    if _has_prompt(checkpoint):
        _check_prompt(checkpoint, read)
        check_special_tokens(checkpoint, tokenizer.special_tokens_map)
    else:
        _check_template(checkpoint, read.around_pair or read.around)
    return read


def _bare(checkpoint: Checkpoint) -> ReadTokenizer:
    """tokenizer.json without the special tokens that it would put around a text."""
    read = read_file(checkpoint.tokenizer_file)
    backend = Tokenizer.from_str(read.definition)
    _check_model(checkpoint, backend)
    side = Side((backend.truncation or {}).get("direction", "right"))
    return replace(read, around=Template([], [], []), truncation_side=side)


def _of_transformers(checkpoint: Checkpoint) -> Any:
    module = import_module("vecmill.models.transformers_tokenizers")
    return module.from_files(checkpoint, needs_file=_has_prompt(checkpoint))


def _lower_case_first(normalizer: Any) -> Any:
    """sentence-transformers' `do_lower_case`."""
    steps: list[Any] = (
        list(cast(Any, normalizer))
        if isinstance(normalizer, normalizers.Sequence)
        else [normalizer]
        if normalizer
        else []
    )
    if any(isinstance(step, normalizers.Lowercase) for step in steps):
        return normalizer
    return normalizers.Sequence([normalizers.Lowercase(), *steps])


def _has_prompt(checkpoint: Checkpoint) -> bool:
    """Whether it is a reranker that reads one text, in which query and document are put together."""
    return checkpoint.task is Task.RERANK and rerank_form(checkpoint).prompt is not None


def _check_model(checkpoint: Checkpoint, backend: Any) -> None:
    """A tokenizer must give every text tokens, and each time the same."""
    if getattr(backend.model, "dropout", None):
        raise StartupError(
            f"{checkpoint.named}: tokenizer.json has `model.dropout`: {backend.model.dropout}, with which a text's "
            f"tokens are drawn by chance; set it to null, as it is for all but training."
        )
    try:
        backend.encode_batch_fast(UNKNOWN_WORDS)
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(
            f"{checkpoint.named}: the tokenizer fails on a word that it does not know ({first_line(error)[:300]}): its "
            f"`unk_token` is missing, or not in the vocabulary."
        ) from None


def _check_sides(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """On the left, padding moves the positions of a text by as much as its batch is longer."""
    if tokenizer.padding_side != "left":
        return
    same_padding = tokenizer.pad_token_id == checkpoint.config.get("pad_token_id", 1)
    if checkpoint.family.positions.moved_by_left_padding(same_padding=same_padding):
        raise StartupError(
            f"{checkpoint.named}: the tokenizer has `padding_side`: 'left', with which the reference's vectors "
            f"depend on what a text is batched with; supported: 'right'."
        )


def _check_template(checkpoint: Checkpoint, around: Template) -> None:
    texts = 2 if checkpoint.task is Task.RERANK else 1
    if len(around) + texts > checkpoint.max_model_len:
        raise StartupError(
            f"{checkpoint.named}: a maximum length of {checkpoint.max_model_len} tokens leaves no room for a text "
            f"beside the {len(around)} special tokens; raise it (MAX_MODEL_LEN, `max_seq_length`, `model_max_length`)."
        )
    types = int(checkpoint.config.get("type_vocab_size", 2))
    if around.second_type and checkpoint.network.token_types and types < 2:
        raise StartupError(
            f"{checkpoint.named}: the tokenizer gives the second text of a pair a token type of its own, and the model "
            f"has one type; take `token_type_ids` out of `model_input_names`."
        )


def _check_prompt(checkpoint: Checkpoint, read: ReadTokenizer) -> None:
    """A reranker's prompt must stay whole, and that of its family must begin as its tokenizer begins a text."""
    prompt, before = rerank_form(checkpoint).prompt, read.around.before
    if prompt is not None and prompt is checkpoint.family.pair_prompt:
        first = Tokenizer.from_str(read.definition).encode(str(prompt.plain[0]), add_special_tokens=False)
        if first.ids[: len(before)] != before:
            raise StartupError(
                f"{checkpoint.named}: its tokenizer does not begin texts as the prompt of "
                f"{checkpoint.family.model_type} does ({str(prompt.plain[0])!r}): save a chat template with it."
            )
    if prompt is not None and checkpoint.family.has_two_label_head(checkpoint.config):
        last = str(prompt.plain[-1])  # whose hidden state is scored
        if Tokenizer.from_str(read.definition).token_to_id(last) is None:
            raise StartupError(
                f"{checkpoint.named}: its tokenizer does not have the token {last!r}, which ends its prompt: fetch the "
                f"model again."
            )
    if read.truncation_side is Side.LEFT:
        raise StartupError(
            f"{checkpoint.named}: `truncation_side` in tokenizer_config.json would cut the beginning of its prompt; "
            f"supported is 'right'."
        )
    if read.split_special_tokens:
        raise StartupError(
            f"{checkpoint.named}: the tokenizer has `split_special_tokens`, with which its prompt is other tokens; "
            f"supported is false."
        )
