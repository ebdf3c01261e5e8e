"""Every file and key of a tokenizer is honoured or refused: the kind of tokenizer, its tokens, how texts are cut."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.checkpoints.variants import TOLERANCE, Served, Variant, bert, qwen3, reference_vectors, served, xlm_roberta
from tests.models.loaded import LoadedModel, load_model, run, unit
from tests.tiny_checkpoints import VOCAB, edit_json, tiny_cross_encoder, write
from vecmill.core.errors import StartupError
from vecmill.core.threads import WorkerThreads
from vecmill.core.types import Row
from vecmill.inference.text_tokenizer import TextTokenizer
from vecmill.inference.tokenizer_pool import TokenizerPool
from vecmill.models.source import find
from vecmill.models.tokenizer_loading import load_tokenizer

Change = Callable[[Path], Any]
CONFIG, MODULE, MAP = "tokenizer_config.json", "sentence_bert_config.json", "special_tokens_map.json"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEMPLATE = "TemplateProcessing"
# A text that is longer than most limits of this table, with different tokens all along.
NO_EMPTY = ("one", "naïve 你好 ÉCOLE дела", "How do I parse dates in Python? " * 20)
PADS = ("<pad>", "a<pad> <pad>b", "one <pad> two", "<pad> " * 50 + "one", "plain")


def saved_again(base: Change) -> Change:
    """As sentence-transformers writes what it has loaded."""

    def write_again(folder: Path) -> None:
        from sentence_transformers import SentenceTransformer  # slow to import

        first = folder / "first"
        first.mkdir()
        base(first)
        SentenceTransformer(str(first), device="cpu").save_pretrained(str(folder), create_model_card=False)
        shutil.rmtree(first)

    return write_again


def bert_pairs(folder: Path) -> None:
    tiny_cross_encoder(folder, kind="bert", tokenizer_from=find("auto").folder)


def with_rows_for_words(folder: Path) -> None:
    """A model whose embedding was made larger for added words."""
    edit_json(folder / "config.json", vocab_size=VOCAB + 3)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    more = torch.randn(3, tensors[name].shape[1], generator=torch.Generator().manual_seed(0))
    tensors[name] = torch.cat((tensors[name], more))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def xlm_roberta_pairs(folder: Path) -> None:
    tiny_cross_encoder(folder, kind="xlm-roberta")


def says(name: str, **keys: object) -> Change:
    """Set keys of a JSON file, which need not be there."""

    def change(folder: Path) -> None:
        if (folder / name).is_file():
            edit_json(folder / name, **keys)
        else:
            write(folder / name, keys)

    return change


def without(*names: str) -> Change:
    """Remove files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def moved(name: str, to: str) -> Change:
    return lambda folder: (folder / name).rename(folder / to)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for apply_change in changes:
            apply_change(folder)

    return change


def in_tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Change tokenizer.json."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        definition = json.loads(file.read_text("utf-8"))
        edit(definition)
        file.write_text(json.dumps(definition), "utf-8")

    return change


def plain(folder: Path) -> None:
    """The class of tokenizer.json as it stands."""
    says(CONFIG, **FAST)(folder)


def cased(definition: dict[str, Any]) -> None:
    definition["normalizer"] |= {"lowercase": False, "strip_accents": False}


def adds_nothing(definition: dict[str, Any]) -> None:
    definition["post_processor"] = None


def added(content: str, number: int, **others: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **flags, **others}


def adds(*tokens: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda definition: definition["added_tokens"].extend(tokens)


def ends_with(token: str, number: int) -> Callable[[dict[str, Any]], None]:
    def edit(definition: dict[str, Any]) -> None:
        text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}
        definition["post_processor"] = {
            "type": TEMPLATE,
            "single": [text, end],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}, end],
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
        }

    return edit


def as_vocabulary(folder: Path) -> None:
    """A byte-level BPE as the two files of GPT-2."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"]
    write(folder / "vocab.json", model["vocab"])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    file.unlink()


def cut(side: str) -> Callable[[dict[str, Any]], None]:
    truncation = {"direction": side, "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    return lambda definition: definition.update(truncation=truncation)


DOMAIN = (
    added("longer text", VOCAB),
    added("École", VOCAB + 1),
    added("你好", VOCAB + 2, normalized=False),
    added("plants", 4264, normalized=True),
    added("oxygen", 7722, lstrip=True, rstrip=True),
    added("one", 2028, single_word=True),
)


def row(name: str, base: Change, *changes: Change, **others: Any) -> Variant:
    return Variant(name, base, both(*changes), **others)


def refused(name: str, base: Change, sentence: str, *changes: Change, **others: Any) -> Variant:
    return Variant(name, base, both(*changes), refused=sentence, **others)


ADDED_ROWS = {
    "5": {
        "content": "[unused4]",
        "lstrip": True,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
}
SERVED = [
    # normalisation
    row("bert", bert),
    row("bert-cased-by-config", bert, says(CONFIG, do_lower_case=False)),
    row("bert-lower-by-module", bert, says(CONFIG, do_lower_case=False), says(MODULE, do_lower_case=True)),
    row("bert-lower-by-both", bert, says(MODULE, do_lower_case=True)),
    row("bert-lower-by-argument", bert, says(MODULE, processor_kwargs={"do_lower_case": False})),
    row("bert-accents-kept", bert, says(CONFIG, strip_accents=False)),
    row("bert-accents-stripped", bert, says(CONFIG, strip_accents=True, do_lower_case=False)),
    row("bert-chinese-together", bert, says(CONFIG, tokenize_chinese_chars=False)),
    row("bert-config-against-tokenizer", bert, in_tokenizer(cased)),
    row("bert-tokenizer-as-it-stands", bert, in_tokenizer(cased), plain),
    row("bert-plain-lower-by-module", bert, in_tokenizer(cased), plain, says(MODULE, do_lower_case=True)),
    row("bert-no-config", bert, without(CONFIG, MAP)),
    row("bert-unknown-class", bert, says(CONFIG, tokenizer_class="TokenizerOfSomebody")),
    row("xlm-lower-by-module", xlm_roberta, says(MODULE, do_lower_case=True)),
    row("qwen-lower-by-module", qwen3, says(MODULE, do_lower_case=True)),
    # files
    row("bert-vocabulary-alone", bert, without("tokenizer.json")),
    row("bert-cased-vocabulary-alone", bert, without("tokenizer.json"), says(CONFIG, do_lower_case=False)),
    row("bert-added-file", bert, without("tokenizer.json"), says("added_tokens.json", **{"[unused7]": 8})),
    row("qwen-vocabulary-alone", qwen3, as_vocabulary, texts=NO_EMPTY),
    row("xlm-made-anew", xlm_roberta, says(CONFIG, tokenizer_class="XLMRobertaTokenizer")),
    row("xlm-no-prefix", xlm_roberta, says(CONFIG, tokenizer_class="XLMRobertaTokenizerFast", add_prefix_space=False)),
    row("xlm-no-config", xlm_roberta, without(CONFIG, MAP)),
    row("bert-saved-again", saved_again(bert)),
    row("xlm-saved-again", saved_again(xlm_roberta), texts=PADS),
    # special and added tokens
    row(
        "bert-other-separator",
        bert,
        says(
            MAP,
            sep_token="[unused2]",
            cls_token={
                "content": "[unused1]",
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            },
        ),
    ),
    row("bert-separator-by-config", bert, without(MAP), says(CONFIG, sep_token="[unused9]")),
    row("bert-added-by-config", bert, says(CONFIG, added_tokens_decoder=ADDED_ROWS)),
    row("bert-additional", bert, says(CONFIG, additional_special_tokens=["[unused3]", "dates"])),
    row("bert-extra", bert, says(CONFIG, extra_special_tokens=["dates"])),
    row("bert-extra-by-map", bert, says(MAP, additional_special_tokens=["dates"])),
    row("bert-split", bert, says(CONFIG, split_special_tokens=True)),
    row("bert-other-unknown", bert, without(MAP), says(CONFIG, unk_token="[MASK]")),
    row("bert-domain", bert, with_rows_for_words, in_tokenizer(adds(*DOMAIN))),
    row("xlm-split", xlm_roberta, says(CONFIG, split_special_tokens=True)),
    row("xlm-padding-in-texts", xlm_roberta, texts=PADS),
    row("xlm-padding-left", xlm_roberta, says(CONFIG, padding_side="left"), texts=PADS),
    # what is added around a text
    row("qwen", qwen3),
    row("qwen-no-end", qwen3, in_tokenizer(adds_nothing), texts=NO_EMPTY),
    row("qwen-other-end", qwen3, in_tokenizer(ends_with("<|im_end|>", 452))),
    row(
        "qwen-end-by-argument", qwen3, in_tokenizer(adds_nothing), says(MODULE, tokenizer_args={"add_eos_token": True})
    ),
    row("qwen-end-by-config", qwen3, in_tokenizer(adds_nothing), says(CONFIG, add_eos_token=True), texts=NO_EMPTY),
    row("qwen-as-it-stands", qwen3, plain),
    row("bert-adds-nothing", bert, in_tokenizer(adds_nothing), plain, texts=NO_EMPTY),
    row("xlm-adds-nothing", xlm_roberta, in_tokenizer(adds_nothing), texts=NO_EMPTY),
    # length and side
    row("bert-length", bert, says(MODULE, max_seq_length=16)),
    row("bert-length-by-config", bert, says(MODULE, max_seq_length=None), says(CONFIG, model_max_length=20)),
    row(
        "bert-length-old-name",
        bert,
        without(MODULE),
        in_tokenizer(lambda d: d.update(truncation=None)),
        lambda folder: write(folder / CONFIG, {"tokenizer_class": "BertTokenizer", "max_len": 11}),
    ),
    row("bert-length-by-argument", bert, says(MODULE, processor_kwargs={"model_max_length": 12})),
    row("bert-length-by-old-argument", bert, says(MODULE, tokenizer_args={"model_max_length": 12})),
    row(
        "bert-both-arguments",
        bert,
        says(MODULE, processor_kwargs={"do_lower_case": False}, tokenizer_args={"model_max_length": 12}),
    ),
    row("bert-length-no-limit", bert, without(MODULE), says(CONFIG, model_max_length=int(1e30))),
    *(
        row(
            f"bert-length-of-{kind}",
            bert,
            says(MODULE, max_seq_length=9),
            moved(MODULE, f"sentence_{kind}_config.json"),
        )
        for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
    row("bert-length-empty-first", bert, moved(MODULE, "sentence_albert_config.json"), lambda f: write(f / MODULE, {})),
    row("bert-bare", bert, says(MODULE, max_seq_length=9, do_lower_case=True), without("modules.json")),
    row("bert-cut-left", bert, says(CONFIG, truncation_side="left"), says(MODULE, max_seq_length=16)),
    row("bert-cut-left-by-argument", bert, says(MODULE, processor_kwargs={"truncation_side": "left"})),
    row("bert-cut-left-by-tokenizer", bert, in_tokenizer(cut("Left"))),
    row("qwen-cut-left", qwen3, says(CONFIG, truncation_side="left", model_max_length=16)),
    row("xlm-cut-left", xlm_roberta, says(CONFIG, truncation_side="left", model_max_length=16), without(MODULE)),
    # harmless
    row(
        "bert-harmless",
        bert,
        says(
            CONFIG,
            clean_up_tokenization_spaces=False,
            stride=3,
            max_length=7,
            truncation_strategy="longest_first",
            pad_to_multiple_of=None,
        ),
        says(
            MODULE,
            unpad_inputs=False,
            query_length=None,
            model_kwargs={"torch_dtype": "float32"},
            config_args={},
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
            transformer_task="feature-extraction",
        ),
    ),
    row("bert-no-types", bert, says(CONFIG, model_input_names=["input_ids", "attention_mask"])),
    # pairs
    row("pairs", bert_pairs, rerank=True),
    row("pairs-no-types", bert_pairs, says(CONFIG, model_input_names=["input_ids", "attention_mask"]), rerank=True),
    row("pairs-as-it-stands", bert_pairs, plain, rerank=True),
    row("pairs-cased", bert_pairs, says(CONFIG, do_lower_case=False), rerank=True),
    row("pairs-cut-left", bert_pairs, says(CONFIG, truncation_side="left", model_max_length=12), rerank=True),
    row("pairs-domain", bert_pairs, with_rows_for_words, in_tokenizer(adds(*DOMAIN)), rerank=True),
    row("pairs-vocabulary-alone", bert_pairs, without("tokenizer.json"), rerank=True),
    row("pairs-split", bert_pairs, says(CONFIG, split_special_tokens=True), rerank=True),
    row("pairs-xlm", xlm_roberta_pairs, rerank=True),
    row("pairs-xlm-made-anew", xlm_roberta_pairs, says(CONFIG, tokenizer_class="XLMRobertaTokenizer"), rerank=True),
]
CHAT = {"chat_template": "{{ messages }}"}
REFUSED = [
    refused(
        "unknown-key",
        bert,
        "the key `lower_everything` (true), which is not known",
        says(CONFIG, lower_everything=True),
    ),
    refused("vocabulary-elsewhere", bert, "`vocab_file`", says(CONFIG, vocab_file="/etc/passwd")),
    refused("own-code", bert, "`auto_map`", says(CONFIG, auto_map={"AutoTokenizer": ["a.B", None]})),
    refused("processor", bert, "`processor_class`", says(CONFIG, processor_class="CLIPProcessor")),
    refused("no-mask", bert, "`model_input_names`", says(CONFIG, model_input_names=["input_ids"])),
    refused("bad-length", bert, "`model_max_length`: 0;", says(CONFIG, model_max_length=0)),
    refused("length-as-text", bert, '`max_seq_length`: "64"', says(MODULE, max_seq_length="64")),
    refused("no-room", bert, "leaves no room for a text", says(MODULE, max_seq_length=2)),
    refused("bad-side", bert, '`truncation_side`: "middle"', says(CONFIG, truncation_side="middle")),
    refused("left-padding", bert, "`padding_side`: 'left'", says(CONFIG, padding_side="left")),
    refused(
        "left-padding-in-tokenizer",
        bert,
        "`padding_side`: 'left'",
        in_tokenizer(lambda definition: definition["padding"].update(direction="Left")),
    ),
    refused("left-padding-of-pairs", bert_pairs, "`padding_side`", says(CONFIG, padding_side="left"), rerank=True),
    refused(
        "left-padding-by-another",
        xlm_roberta,
        "`padding_side`",
        says(CONFIG, padding_side="left", pad_token="<mask>"),
        says(MAP, pad_token="<mask>"),
    ),
    refused("python-tokenizer", bert, "BertJapaneseTokenizer", says(CONFIG, tokenizer_class="BertJapaneseTokenizer")),
    refused("no-tokens-in-it", bert, "tokenizer.json is not a tokenizer", lambda f: write(f / "tokenizer.json", {})),
    refused("text-for-a-flag", bert, "is of the wrong kind", says(CONFIG, do_lower_case="false")),
    refused("other-tokenizer", bert, "ByT5Tokenizer", says(CONFIG, tokenizer_class="ByT5Tokenizer")),
    refused(
        "unknown-in-map", bert, "special_tokens_map.json has the key `model_max_length`", says(MAP, model_max_length=7)
    ),
    refused(
        "added-without-number", bert, "added_tokens.json gives 'word' no number", says("added_tokens.json", word="1")
    ),
    refused("no-object", bert, "holds no JSON object", lambda folder: write(folder / MODULE, [1])),
    refused("no-json", bert, "is not valid JSON", lambda folder: (folder / CONFIG).write_text("{")),
    refused("unknown-of-module", bert, "sentence_bert_config.json has the key `strip`", says(MODULE, strip=True)),
    refused("query-length", bert, "`query_length`: 8; supported: null", says(MODULE, query_length=8)),
    refused("document-length", bert, "`document_length`: 8", says(MODULE, document_length=8)),
    refused(
        "query-expansion", bert, "`query_expansion`", says(MODULE, query_expansion={"strategy": "min", "length": 8})
    ),
    refused("processing", bert, "`processing_kwargs`", says(MODULE, processing_kwargs={"text": {"max_length": 8}})),
    refused("messages", bert, "`modality_config`", says(MODULE, modality_config={"message": {}})),
    refused("other-output", bert, '`transformer_task`: "fill-mask"', says(MODULE, transformer_task="fill-mask")),
    refused(
        "unknown-argument", bert, "`processor_kwargs.subfolder`", says(MODULE, processor_kwargs={"subfolder": "x"})
    ),
    refused(
        "chance",
        qwen3,
        "`model.dropout`: 0.5",
        plain,
        in_tokenizer(lambda definition: definition["model"].update(dropout=0.5)),
    ),
    refused(
        "unknown-word",
        bert,
        "fails on a word that it does not know",
        plain,
        in_tokenizer(lambda definition: definition["model"].update(unk_token="[none]")),
    ),
    refused(
        "file-argument",
        bert,
        "`processor_kwargs.tokenizer_file`",
        says(MODULE, processor_kwargs={"tokenizer_file": "/etc/passwd"}),
    ),
    refused(
        "config-argument", bert, "`config_args.num_hidden_layers`", says(MODULE, config_args={"num_hidden_layers": 1})
    ),
    refused("model-argument", bert, "`model_kwargs.revision`", says(MODULE, model_kwargs={"revision": "x"})),
    refused("arguments-as-list", bert, "`model_args`: [1]", says(MODULE, model_args=[1])),
    refused("other-tokenizers-folder", bert, "`tokenizer_name_or_path`", says(MODULE, tokenizer_name_or_path="x")),
    refused("chat-template", bert, "chat template", says(CONFIG, **CHAT), without("modules.json")),
    refused(
        "chat-template-file",
        bert,
        "chat template",
        lambda f: (f / "chat_template.jinja").write_text("x"),
        without("modules.json"),
    ),
    refused("image-processor", bert, "preprocessor_config.json", says("preprocessor_config.json", size=3)),
    refused("no-tokenizer", bert, "no vocabulary to make one of", without("tokenizer.json", "vocab.txt")),
    refused(
        "other-vocabulary",
        bert,
        "none of the files that BertTokenizer is made of",
        without("tokenizer.json"),
        moved("vocab.txt", "vocab.json"),
    ),
    refused(
        "sentencepiece-alone",
        xlm_roberta,
        "save_pretrained",
        says(CONFIG, tokenizer_class="XLMRobertaTokenizer"),
        moved("tokenizer.json", "sentencepiece.bpe.model"),
    ),
    refused(
        "types-of-one-type",
        xlm_roberta_pairs,
        "token type of its own",
        says(CONFIG, model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
        in_tokenizer(
            lambda d: (
                d["post_processor"]["pair"][-2]["Sequence"].update(type_id=1)
                or d["post_processor"]["pair"][-1]["SpecialToken"].update(type_id=1)
            )
        ),
        rerank=True,
    ),
]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(SERVED, tmp_path_factory.mktemp("variants"), max_batch_tokens=128, token_ids="model") as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)


async def test_a_text_without_tokens_is_named(server: Served) -> None:
    """Of a tokenizer that adds nothing an empty text is an error, and the request's other texts are not run for it."""
    for name, text in (("bert-adds-nothing", ""), ("xlm-adds-nothing", ""), ("qwen-no-end", "")):
        body = {"model": name, "input": ["one", text, "two"]}
        answer = await server.client.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")
        body["input"] = ["one", "two"]
        assert (await server.client.post("/v1/embeddings", json=body)).is_success


def test_a_token_around_texts_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    """As of another model's `tokenizer_class`; every text would fail."""
    qwen3(tmp_path)
    says(CONFIG, tokenizer_class="RobertaTokenizer")(tmp_path)
    with pytest.raises(StartupError, match="puts the token 477 around texts, but the model embeds 476"):
        tokenized(load_model(tmp_path))


async def test_padding_in_token_ids_has_the_references_position(server: Served) -> None:
    """As in a text."""
    variant = next(candidate for candidate in SERVED if candidate.name == "xlm-padding-in-texts")
    tokenizer = Tokenizer.from_file(str(server.folders[variant.name] / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in PADS]
    assert any(1 in row for row in ids)
    answer = await server.client.post("/v1/embeddings", json={"model": variant.name, "input": ids})
    measured = np.array([entry["embedding"] for entry in answer.json()["data"]])
    np.testing.assert_allclose(measured, await server.vectors(variant), atol=1e-6, rtol=0)


async def test_the_clients_side_wins_over_the_tokenizers(server: Served) -> None:
    variant = next(candidate for candidate in SERVED if candidate.name == "bert-cut-left")
    other = next(candidate for candidate in SERVED if candidate.name == "bert-length")
    for fields, same in (({}, False), ({"truncation_side": "right"}, True)):
        ends, starts = await server.vectors(variant, **fields), await server.vectors(other)
        assert np.allclose(ends, starts, atol=1e-6) is same


# A few keys of both files at once, with values that are right, wrong and of other types.
TOKENS = ("[unused1]", "[SEP]", "one", "[unused8]")
KEYS = st.fixed_dictionaries(
    {},
    optional={
        "do_lower_case": st.sampled_from((True, False, None)),
        "strip_accents": st.sampled_from((True, False, None)),
        "tokenize_chinese_chars": st.booleans(),
        "model_max_length": st.sampled_from((7, 16, 10**30, 1e30, None, 0, "16", True)),
        "max_len": st.sampled_from((9, None)),
        "truncation_side": st.sampled_from(("left", "right", "both", None)),
        "padding_side": st.sampled_from(("left", "right")),
        "add_prefix_space": st.booleans(),
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
        "split_special_tokens": st.sampled_from((True, False, None)),
        "model_input_names": st.sampled_from((["input_ids", "attention_mask"], ["input_ids"], "input_ids")),
        **{
            name: st.sampled_from(TOKENS) for name in ("sep_token", "cls_token", "unk_token", "mask_token", "eos_token")
        },
        "additional_special_tokens": st.lists(st.sampled_from(TOKENS), max_size=2),
        "extra_special_tokens": st.lists(st.sampled_from(TOKENS), max_size=2),
        "image_token": st.sampled_from(TOKENS),
        "clean_up_tokenization_spaces": st.booleans(),
        "max_length": st.sampled_from((3, None)),
        "stride": st.sampled_from((0, 2)),
        "processor_class": st.sampled_from((None, "BertProcessor")),
        "fix_mistral_regex": st.booleans(),
    },
)
CLASSES = st.sampled_from(
    (None, "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "None")
)
MODULE_KEYS = st.fixed_dictionaries(
    {},
    optional={
        "max_seq_length": st.sampled_from((5, 16, 64, None, 0, -1, 10.0)),
        "do_lower_case": st.sampled_from((True, False)),
        "query_length": st.sampled_from((None, 8)),
        "processor_kwargs": KEYS,
        "tokenizer_args": KEYS,
        "unpad_inputs": st.sampled_from((None, False)),
        "processing_kwargs": st.sampled_from((None, {}, {"text": {"max_length": 5}})),
        "transformer_task": st.sampled_from(("feature-extraction", "fill-mask")),
    },
)


def check_mutant(config: dict[str, Any], kind: str | None, module: dict[str, Any]) -> None:
    """Equal to the reference, or refused, or of no use to the reference either."""
    with TemporaryDirectory() as root:
        folder = Path(root) / "mutant"
        folder.mkdir()
        bert(folder)
        says(CONFIG, **config, **({"tokenizer_class": kind} if kind else {}))(folder)
        write(folder / MODULE, module)
        try:
            loaded = load_model(folder)
            rows = tokenized(loaded)
        except StartupError:
            return
        try:
            expected = reference_vectors(folder, MUTANT_TEXTS)
        except Exception as error:
            event(f"the reference fails: {type(error).__name__}")
            return
        event("equal")
        np.testing.assert_allclose(unit(run(loaded[1], rows)), expected, atol=TOLERANCE, rtol=0)


MUTANT_TEXTS = ("naïve 你好 ÉCOLE [SEP] one [unused1]x", "one two [MASK] three " * 20, "One")


def tokenized(loaded: LoadedModel) -> list[Row]:
    checkpoint, model = loaded
    with WorkerThreads(1) as threads:
        pool = TokenizerPool(load_tokenizer(checkpoint), model.vocab_size, checkpoint.max_model_len, threads)
        tokenizer = TextTokenizer(pool, checkpoint.text_format, checkpoint.max_model_len, model.vocab_size)
        return [encoded.row for encoded in asyncio.run(tokenizer.encode(MUTANT_TEXTS))]


@settings(max_examples=12, deadline=None)
@given(config=KEYS, kind=CLASSES, module=MODULE_KEYS)
def test_any_keys_are_equal_or_refused(config: dict[str, Any], kind: str | None, module: dict[str, Any]) -> None:
    check_mutant(config, kind, module)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@settings(max_examples=150, deadline=None)
@given(config=KEYS, kind=CLASSES, module=MODULE_KEYS)
def test_any_keys_are_equal_or_refused_at_length(
    config: dict[str, Any], kind: str | None, module: dict[str, Any]
) -> None:
    check_mutant(config, kind, module)
