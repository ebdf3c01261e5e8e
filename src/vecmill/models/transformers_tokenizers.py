"""Tokenizers as transformers makes them of a checkpoint's files.

`tokenizer_loading` imports this where a checkpoint needs it: transformers takes seconds to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vecmill.core.errors import StartupError, first_line
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.tokenizer_files import read_file

CORRECT = (
    "A value in tokenizer_config.json or special_tokens_map.json is of the wrong kind, or `tokenizer_class` is not "
    "that of tokenizer.json: correct it, or fetch the model again."
)


def from_files(checkpoint: Checkpoint, *, needs_file: bool) -> PreTrainedTokenizerFast:
    """What transformers makes of a checkpoint's files.

    Args:
        needs_file: whether only a tokenizer.json will do, and no vocabulary to make one of.

    Raises:
        StartupError: it makes none, or one that does more to texts than the `tokenizers` library.
    """
    folder, has_file = checkpoint.folder, checkpoint.tokenizer_file.is_file()
    if not has_file and needs_file:
        raise StartupError(f"{checkpoint.named}: {folder} has no tokenizer.json. {_cure(folder)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            **_config_argument(checkpoint),
            **checkpoint.tokenizer.arguments,
        )
    except Exception as error:  # whatever a file makes of transformers
        if has_file:
            read_file(checkpoint.tokenizer_file)  # says what is wrong with that
        cure = CORRECT if has_file else _cure(folder)
        raise StartupError(
            f"{checkpoint.named}: transformers makes no tokenizer of {folder} ({first_line(error)[:300]}). {cure}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or _has_own_steps(type(tokenizer)):
        raise StartupError(
            f"{checkpoint.named}: the tokenizer class {type(tokenizer).__name__} is not one of the `tokenizers` "
            f"library; only those are served."
        )
    if not has_file and not _has_vocabulary(folder, type(tokenizer)):
        raise StartupError(
            f"{checkpoint.named}: {folder} has no tokenizer.json, and none of the files that "
            f"{type(tokenizer).__name__} is made of. {_cure(folder)}"
        )
    return tokenizer


def _config_argument(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where transformers has no class of its `model_type`: instead of what it would make of config.json."""
    return {} if checkpoint.family.model_type in CONFIG_MAPPING else {"config": PreTrainedConfig()}


def _cure(folder: Path) -> str:
    return (
        f"Where the files are right, write a tokenizer.json: `pip install sentencepiece protobuf`, then `python -c "
        f'"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained('
        f'{str(folder)!r})"`.'
    )


def _has_own_steps(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether a class does more to texts than the library."""
    base: Any = PreTrainedTokenizerFast
    return any(getattr(kind, name) is not getattr(base, name) for name in ("__call__", "_encode_plus"))


def _has_vocabulary(folder: Path, kind: type[PreTrainedTokenizerBase]) -> bool:
    """Without it transformers makes a tokenizer of the special tokens alone."""
    name = kind.vocab_files_names.get("vocab_file")
    return name is not None and (folder / name).is_file()
