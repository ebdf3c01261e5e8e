"""What a checkpoint's files say about its tokenizer, key by key. Reads no tensors and does not know transformers.

The files are those that sentence-transformers and transformers read: tokenizer_config.json, special_tokens_map.json,
added_tokens.json and, of a folder with a modules.json, the transformer module's own file. `tokenizer_loading` reads the
tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vecmill.core.errors import StartupError, first_line
from vecmill.core.types import Side, Task
from vecmill.models.chat_template import SPECIAL_TOKENS
from vecmill.models.config_keys import own_code
from vecmill.models.keys import HARMLESS, HONOURED, Rule, check_keys, only, read_json, rules

# The first of these that says anything is read, as sentence-transformers does.
MODULE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Their presence makes of a folder a model of images or sound.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# What transformers converts where there is no tokenizer.json.
VOCABULARY_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

DEFAULT_TEMPLATE, TEMPLATE_FILE, TEMPLATE_FOLDER = "default", "chat_template.jinja", "additional_chat_templates"


def _is_length(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 1)


def _names_inputs(value: Any) -> bool:
    return isinstance(value, list) and {"input_ids", "attention_mask"} <= {str(name) for name in value}


LENGTH = Rule(_is_length, "null or a number of tokens from 1 on")
FLAG = only(True, False)

# Of tokenizer_config.json. What is honoured is read by transformers, which makes the tokenizer of it, or here.
TOKENIZER_CONFIG: Mapping[str, Rule] = {
    "model_max_length": LENGTH,
    "max_len": LENGTH,
    "truncation_side": only("right", "left"),
    "padding_side": only("right", "left"),
    "model_input_names": Rule(_names_inputs, "a list with input_ids and attention_mask"),
    "split_special_tokens": FLAG,
    "keep_accents": FLAG,  # ALBERT's
    "split_by_punct": FLAG,  # DeBERTa's
    **rules(HONOURED, SPECIAL_TOKENS),
    **rules(
        HONOURED,
        (
            "add_bos_token",
            "add_eos_token",
            "add_prefix_space",
            "added_tokens_decoder",
            "additional_special_tokens",
            "do_lower_case",
            "extra_special_tokens",
            "legacy",
            "strip_accents",
            "tokenize_chinese_chars",
            "tokenizer_class",
        ),
    ),
    # Code of the checkpoint's own, and processors of images and sound.
    "auto_map": own_code(  # transformers' class of that name, which honours `add_eos_token` too
        r"(Alibaba-NLP/[\w.-]+--)?tokenization_qwen\.Qwen2Tokenizer(Fast)?", "gte-Qwen2"
    ),
    "init_inputs": only(None, []),
    "processor_class": only(None),
    **rules(
        HARMLESS,
        (
            "backend",
            "chat_template",  # where it is used, the module's file says so
            "clean_up_tokenization_spaces",
            "do_basic_tokenize",
            "errors",
            "from_slow",
            "full_tokenizer_file",
            "is_local",
            "local_files_only",
            "max_length",
            "name_or_path",
            "never_split",
            "pad_to_multiple_of",
            "pad_token_type_id",
            "remove_space",  # ALBERT's: its class takes spaces as they are
            "sp_model_kwargs",
            "spaces_between_special_tokens",
            "special_tokens_map_file",
            "stride",
            "tokenizer_file",
            "trim_offsets",
            "truncation_strategy",
            "use_default_system_prompt",
            "use_fast",
            "verbose",
            "vocab_type",  # DeBERTa's, of its files
        ),
    ),
}
# Of special_tokens_map.json.
SPECIAL_TOKENS_MAP: Mapping[str, Rule] = rules(
    HONOURED, (*SPECIAL_TOKENS, "additional_special_tokens", "extra_special_tokens")
)
# Of arguments that the module's file has for transformers.
NO_ARGUMENTS = {
    "auto_map",
    "backend",
    "from_slow",
    "is_local",
    "local_files_only",
    "name_or_path",
    "processor_class",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",  # as an argument it would be opened, wherever it is
}
PROCESSOR_ARGUMENTS: Mapping[str, Rule] = {
    key: rule for key, rule in TOKENIZER_CONFIG.items() if key not in NO_ARGUMENTS
} | rules(HARMLESS, ("trust_remote_code",))
MODEL_ARGUMENTS: Mapping[str, Rule] = rules(
    HARMLESS, ("attn_implementation", "dtype", "low_cpu_mem_usage", "torch_dtype", "trust_remote_code")
)
CONFIG_ARGUMENTS: Mapping[str, Rule] = rules(HARMLESS, ("trust_remote_code",))
# Each has a new name and an old one. Where a file has both, sentence-transformers takes the value of the old one.
ARGUMENTS = {
    "processor_kwargs": PROCESSOR_ARGUMENTS,
    "tokenizer_args": PROCESSOR_ARGUMENTS,
    "model_kwargs": MODEL_ARGUMENTS,
    "model_args": MODEL_ARGUMENTS,
    "config_kwargs": CONFIG_ARGUMENTS,
    "config_args": CONFIG_ARGUMENTS,
}
# What the transformer module gives, by task.
OUTPUTS: Mapping[Task, Mapping[str, tuple[str, str]]] = {
    Task.EMBED: {"feature-extraction": ("last_hidden_state", "token_embeddings")},
    Task.RERANK: {
        "sequence-classification": ("logits", "scores"),
        "text-generation": ("logits", "causal_logits"),
    },
}
OF_POOLED = OUTPUTS[Task.EMBED]  # of a reranker that scores pooled vectors too


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What the files say beside the tokenizer itself."""

    max_length: float | None
    """Tokens of a text at most; None: as many as the model has positions for."""
    lower_case: bool
    """Texts are put in lower case before the tokenizer's own normalisation."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the module's file adds to tokenizer_config.json."""
    messages: str = ""
    """Of an embedder whose texts are messages of a chat template: `flat` or `structured`; empty: they are not."""
    end_token: str | None = None
    """What `add_eos_token` puts behind a text; None: nothing."""


@dataclass(frozen=True, slots=True)
class Template:
    """Special tokens around a text, or around and between two."""

    before: list[int]
    between: list[int]
    after: list[int]
    second_type: bool = False
    """Whether the second text has the token type 1."""

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True, slots=True)
class ReadTokenizer:
    """A tokenizer as the `tokenizers` library reads it, and what is done around that."""

    file: Path
    """Where it is from, for error texts."""
    definition: str
    """JSON."""
    around: Template
    around_pair: Template | None
    """None where it is not needed, or not supported."""
    truncation_side: Side = Side.RIGHT
    """What is cut of a text that is too long, unless the request says another."""
    split_special_tokens: bool = False
    """Special tokens written in a text are plain text."""


@contextmanager
def panics_refused(file: Path) -> Iterator[None]:
    """The `tokenizers` library is Rust: where that panics, what it raises is no Exception. A StartupError instead."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # it cannot be imported
            raise
        raise StartupError(
            f"{file}: the tokenizers library fails on it ({first_line(error)[:300]}); fetch the model again."
        ) from None


def parsed(file: Path) -> tuple[str, Tokenizer]:
    """What a tokenizer.json says, and the tokenizer that the library makes of it.

    Raises:
        StartupError: it is not a tokenizer.
    """
    try:
        with panics_refused(file):
            definition = file.read_text("utf-8")
            return definition, Tokenizer.from_str(definition)
    except StartupError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(
            f"{file} is not a tokenizer ({type(error).__name__}: {error}); fetch the model again."
        ) from None


def read_file(file: Path, *, pairs: bool = False) -> ReadTokenizer:
    """A tokenizer.json as it stands; with `pairs`, for a reranker of two texts.

    Raises:
        StartupError: it is not a tokenizer.
    """
    definition, tokenizer = parsed(file)
    with panics_refused(file):
        around_pair = template(file, tokenizer, pair=True) if pairs else None
        return ReadTokenizer(file, definition, template(file, tokenizer, pair=False), around_pair)


def _text_with_tokens(tokenizer: Tokenizer) -> str | None:
    """A text with at least one token: with none, the special tokens before and after it could not be told apart."""
    for texts in (lambda: ("a", "0", "."), tokenizer.get_vocab):  # a vocabulary takes a while to be listed
        for text in texts():
            if tokenizer.encode(text, add_special_tokens=False).ids:
                return text
    return None


def template(file: Path, tokenizer: Tokenizer, *, pair: bool, token_types: bool = True) -> Template:
    """The special tokens that a tokenizer puts around a text, or around and between two.

    Args:
        file: for errors.
        token_types: whether the model is told of them.

    Raises:
        StartupError: it turns the texts round, or gives them other token types than 0 and 1.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = _text_with_tokens(tokenizer)
    if text is None:
        raise StartupError(f"{file}: the tokenizer gives no tokens for any text; fetch the model again.")
    encoding = tokenizer.encode(text, text) if pair else tokenizer.encode(text)
    first, second = ([index for index, place in enumerate(encoding.sequence_ids) if place == text] for text in (0, 1))
    start = second[0] if pair and second else len(encoding.ids)
    kinds = set(encoding.type_ids[:start]), set(encoding.type_ids[start:])
    known = kinds[0] == {0} and kinds[1] in (set(), {0}, {1})
    whole = all(part and list(range(part[0], part[-1] + 1)) == part for part in ((first, second) if pair else (first,)))
    if not whole or first[-1] >= start or (token_types and not known):
        raise StartupError(
            f"{file}: the template that puts special tokens around texts is not supported: the texts in their order, "
            f"the first with the token type 0 and the second with 0 or 1."
        )
    ids: list[int] = encoding.ids
    end = second[-1] if pair else first[-1]
    between = ids[first[-1] + 1 : start] if pair else []
    return Template(ids[: first[0]], between, ids[end + 1 :], token_types and kinds[1] == {1})


def tokenizer_settings(
    named: str, folder: Path, task: Task, *, text_half: bool = False, pools: bool = False
) -> TokenizerSettings:
    """Check every key of the tokenizer's files, and read those that are not the tokenizer's own.

    Args:
        named: the setting that names the model, for errors.
        text_half: whether the model reads pictures or sound too, and its files say how.
        pools: of a reranker, whether its modules pool hidden states.

    Raises:
        StartupError: a file or a key is not supported.
    """
    _check_files(named, folder, text_half=text_half)
    config = _checked(named, folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _checked(named, folder / "special_tokens_map.json", SPECIAL_TOKENS_MAP)
    outputs = OF_POOLED if pools else OUTPUTS[task]
    module = _module(named, folder, task, outputs, text_half=text_half)
    _check_chat_template(named, folder, task)
    arguments = module.get("tokenizer_args", module.get("processor_kwargs")) or {}
    return TokenizerSettings(
        max_length=_max_length(config, module, arguments),
        lower_case=bool(module.get("do_lower_case", False)),
        arguments={key: value for key, value in arguments.items() if key != "trust_remote_code"},
        messages=_message_format(module) if task is Task.EMBED else "",
        end_token=_end_token(named, folder, {**config, **arguments}),
    )


def _end_token(named: str, folder: Path, config: Mapping[str, Any]) -> str | None:
    if config.get("add_eos_token") is not True:
        return None
    token = config.get("eos_token") or read_json(named, folder / "special_tokens_map.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def as_it_stands(named: str, file: Path) -> TokenizerSettings:
    """What a tokenizer.json says by itself: its truncation counts, where nothing else is read.

    Raises:
        StartupError: there is none, or its truncation is not known here.
    """
    content = read_json(named, file)
    if not content:
        raise StartupError(f"{named}: {file} is missing; fetch the model again.")
    cut = content.get("truncation") or {}
    check_keys(named, file, cut, TRUNCATION, within="truncation")
    return TokenizerSettings(cut.get("max_length"), False)


TRUNCATION: Mapping[str, Rule] = {
    "max_length": LENGTH,
    "direction": only("Right", "Left"),
    **rules(HARMLESS, ("strategy", "stride")),
}


def _max_length(config: Mapping[str, Any], module: Mapping[str, Any], arguments: Mapping[str, Any]) -> float | None:
    """sentence-transformers' order: the module's arguments, its own key, the tokenizer's file."""
    if "model_max_length" not in arguments and (tokens := module.get("max_seq_length")) is not None:
        return float(tokens)
    merged = {**config, **arguments}
    length = merged.get("model_max_length", merged.get("max_len"))
    return None if length is None else float(length)


def _message_format(module: Mapping[str, Any]) -> str:
    message = (module.get("modality_config") or {}).get("message")
    if message is None:
        return ""
    return "flat" if message.get("format") == "flat" else "structured"


def _check_files(named: str, folder: Path, *, text_half: bool) -> None:
    processor = next((name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if processor and not text_half:
        raise StartupError(
            f"{named}: {folder} has a {processor}, so its reference is a processor of images or sound; models of text "
            f"alone are served. If the model reads text alone, remove the file."
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", *VOCABULARY_FILES)):
        raise StartupError(
            f"{named}: {folder} has no tokenizer.json, and no vocabulary to make one of "
            f"({', '.join(VOCABULARY_FILES)}), so it is not a model folder."
        )
    added = read_json(named, folder / "added_tokens.json")
    if wrong := next((token for token, index in added.items() if type(index) is not int), None):
        raise StartupError(f"{named}: added_tokens.json gives {wrong!r} no number.")


def _checked(named: str, file: Path, known: Mapping[str, Rule]) -> dict[str, Any]:
    content = read_json(named, file)
    check_keys(named, file, content, known)
    return content


def _module(
    named: str, folder: Path, task: Task, outputs: Mapping[str, tuple[str, str]], *, text_half: bool
) -> dict[str, Any]:
    """What the transformer module's file says; sentence-transformers reads it only where modules.json lists modules."""
    if not (folder / "modules.json").is_file():
        return {}
    file, module = next(
        ((folder / name, content) for name in MODULE_FILES if (content := read_json(named, folder / name))),
        (folder / MODULE_FILES[0], {}),
    )
    transformer_task = str(module.get("transformer_task", "feature-extraction"))
    check_keys(named, file, module, _module_keys(task, outputs, transformer_task, text_half=text_half))
    for key, known in ARGUMENTS.items():
        arguments = module.get(key) or {}
        if not isinstance(arguments, dict):
            raise StartupError(f"{named}: {file.name} has `{key}`: {arguments!r}; supported: a JSON object.")
        check_keys(named, file, arguments, known, within=key)
    return module


def _module_keys(
    task: Task, outputs: Mapping[str, tuple[str, str]], transformer_task: str, *, text_half: bool
) -> Mapping[str, Rule]:
    output, module_output = outputs.get(transformer_task, next(iter(outputs.values())))
    text = {"method": "forward", "method_output_name": output}

    def reads_text(value: Any) -> bool:
        if not isinstance(value, dict) or not all(isinstance(each, dict | None) for each in value.values()):
            return False
        said, message = (value.get(kind) or {} for kind in ("text", "message"))
        if task is Task.EMBED and text_half:
            of_text = message | {"format": None} == {**text, "format": None} or not message
            return value.get("text") == text and of_text and message.get("format") in (None, "flat", "structured")
        if task is Task.EMBED:
            return bool(value == {"text": text})
        # A pair may be messages, which a chat template puts together: `rerank_prompt` reads how.
        plain: dict[Any, Any] = {**(said or text)}
        plain.pop("format", None)
        return plain == text and set(value) - ({"image"} if text_half else set()) <= {"text", "message"}

    return {
        "transformer_task": only(*outputs),
        "modality_config": Rule(reads_text, repr({"text": text})),
        "module_output_name": only(module_output),
        "max_seq_length": LENGTH,
        "do_lower_case": FLAG,
        **rules(only(None), ("query_length", "document_length", "query_expansion", "cache_dir")),
        "processing_kwargs": only(None, {}) if task is Task.EMBED else HONOURED,  # of chat templates
        **rules(HARMLESS, ("unpad_inputs",)),
        **rules(HONOURED, ARGUMENTS),
    }


def _check_chat_template(named: str, folder: Path, task: Task) -> None:
    """Without modules.json sentence-transformers makes messages of texts where the tokenizer has a chat template."""
    if task is Task.EMBED and not (folder / "modules.json").is_file() and chat_templates(named, folder, {}):
        raise StartupError(
            f"{named}: the tokenizer has a chat template and {folder} has no modules.json: sentence-transformers would "
            f"put every text into a message of that template. Save the model with sentence-transformers, or remove the "
            f"template ({TEMPLATE_FILE}, `chat_template` of tokenizer_config.json)."
        )


def chat_templates(named: str, folder: Path, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name; the module's arguments win over files, as transformers has it.

    Args:
        arguments: what the module's file adds to tokenizer_config.json.

    Raises:
        StartupError: one is no text.
    """
    templates = arguments.get("chat_template")
    if templates is None:
        templates = _template_files(named, folder)
    if templates is None:
        templates = read_json(named, folder / "tokenizer_config.json").get("chat_template")
    if isinstance(templates, list) and all(isinstance(each, dict) for each in templates):
        templates = {each.get("name"): each.get("template") for each in templates}
    elif templates is None:
        return {}
    by_name = templates if isinstance(templates, dict) else {DEFAULT_TEMPLATE: templates}
    if not all(isinstance(text, str) for pair in by_name.items() for text in pair):
        raise StartupError(
            f"{named}: `chat_template` in tokenizer_config.json (or in `processor_kwargs`) must be a text, or a list "
            f"of objects with the texts `name` and `template`."
        )
    return by_name


def _template_files(named: str, folder: Path) -> dict[str, str] | None:
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files = {DEFAULT_TEMPLATE: folder / TEMPLATE_FILE, **files}
    try:
        return {name: path.read_text("utf-8") for name, path in files.items()} or None
    except UnicodeDecodeError:
        raise StartupError(
            f"{named}: a chat template in {folder} (*.jinja) is not UTF-8; fetch the model again."
        ) from None
