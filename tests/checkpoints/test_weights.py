"""Which weights are served, where a folder has several."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.variants import TEXTS, Served, Variant, bert, qwen3, served, xlm_roberta
from tests.tiny_checkpoints import write

GOLDEN = Path(__file__).parents[1] / "golden"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WORDS, BIAS = "embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"

Weights = dict[str, torch.Tensor]
Change = Callable[[Path], object]


def other_weights(folder: Path) -> Weights:
    """Of the same shapes, with other values."""
    torch.manual_seed(5)
    return {name: torch.randn_like(each) for name, each in load_file(folder / SINGLE).items()}


def edited(edit: Callable[[Weights], object]) -> Change:
    """The weights changed."""

    def change(folder: Path) -> None:
        weights = load_file(folder / SINGLE)
        edit(weights)
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})

    return change


def renamed(rename: Callable[[str], str]) -> Change:
    """The weights under other names."""

    def change(folder: Path) -> None:
        weights = {rename(name): each for name, each in load_file(folder / SINGLE).items()}
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})

    return change


def put(name: str, value: torch.Tensor) -> Change:
    """One tensor set."""
    return edited(lambda weights: weights.__setitem__(name, value))


def moved(name: str) -> Change:
    """The weights' file under another name, or below another folder."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / SINGLE).rename(folder / name)

    return change


def beside(name: str) -> Change:
    """Other weights in a file of this name."""
    return lambda folder: save_file(other_weights(folder), folder / name, metadata={"format": "pt"})


def instead(*names: str) -> Change:
    """Files with these names and no safetensors."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"some other format")

    return change


def gguf_alone(folder: Path) -> None:
    (folder / "tiny-q8_0.gguf").write_bytes(b"GGUF")


def sharded(folder: Path) -> dict[str, Weights]:
    """The weights in two files with an index, and what each holds."""
    weights = load_file(folder / SINGLE)
    names = sorted(weights)
    halves = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    shards = {file: {name: weights[name] for name in half} for file, half in halves.items()}
    for file, held in shards.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {name: file for file, half in halves.items() for name in half}
    write(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": index})
    (folder / SINGLE).unlink()
    return shards


def reindexed(edit: Callable[[dict[str, str]], object]) -> Change:
    """In two files, with a change to the index."""

    def change(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / INDEX).read_text("utf-8"))
        edit(index["weight_map"])
        write(folder / INDEX, index)

    return change


def stale_index(folder: Path) -> None:
    """An earlier save in two files, and its index, beside the weights of now."""
    now = (folder / SINGLE).read_bytes()
    save_file(other_weights(folder), folder / SINGLE, metadata={"format": "pt"})
    sharded(folder)
    (folder / SINGLE).write_bytes(now)


def index_without_files(folder: Path) -> None:
    write(folder / INDEX, {"metadata": {}, "weight_map": {WORDS: "model-00001-of-00009.safetensors"}})


def stray_shard(folder: Path) -> None:
    """A file of an earlier save that the index does not list."""
    other = other_weights(folder)
    sharded(folder)
    save_file(other, folder / "model-00003-of-00003.safetensors", metadata={"format": "pt"})


def in_both_shards(folder: Path) -> None:
    shards = sharded(folder)
    first, second = (dict(shards[file]) for file in SHARDS)
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, folder / SHARDS[1], metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    with (folder / SINGLE).open("r+b") as file:
        file.truncate((folder / SINGLE).stat().st_size - 100)


def twice_in_the_header(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name = json.dumps(BIAS)
    doubled = header[:-1] + b"," + name.encode() + b":" + json.dumps(json.loads(header)[BIAS]).encode() + b"}"
    (folder / SINGLE).write_bytes(len(doubled).to_bytes(8, "little") + doubled + content[8 + length :])


def adapter(folder: Path) -> None:
    write(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8})
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / SINGLE).unlink()
    (folder / "config.json").unlink()


def twice_by_prefix(folder: Path) -> None:
    edited(lambda weights: weights.update({f"model.{name}": each + 1 for name, each in list(weights.items())}))(folder)


def cast(dtype: torch.dtype) -> Change:
    return edited(lambda weights: weights.update({name: each.to(dtype) for name, each in weights.items()}))


def checkpoint_below(folder: Path) -> None:
    """A training run's folder in the model's."""
    (folder / "checkpoint-500").mkdir()
    save_file(other_weights(folder), folder / "checkpoint-500" / SINGLE, metadata={"format": "pt"})


VARIANTS = [
    # What is read, whatever lies beside it.
    Variant("bert", bert),
    Variant("other-beside", bert, beside("model_old.safetensors")),
    Variant("earlier-in-the-alphabet", bert, beside("a.safetensors")),
    Variant("variant-beside", bert, beside("model.fp16.safetensors")),
    Variant("stale-index", bert, stale_index),
    Variant("index-without-files", bert, index_without_files),
    Variant("pickle-beside", bert, lambda folder: (folder / "pytorch_model.bin").write_bytes(b"pickled")),
    Variant("onnx-beside", bert, lambda folder: write(folder / "onnx" / "model.onnx", "onnx")),
    Variant("checkpoint-below", bert, checkpoint_below),
    Variant("sharded", bert, sharded),
    Variant("stray-shard", bert, stray_shard),
    Variant("sharded-xlm-roberta", xlm_roberta, sharded, texts=TEXTS[:4]),
    Variant("sharded-qwen3", qwen3, sharded),
    Variant("not-in-the-index", bert, reindexed(lambda index: index.pop(BIAS))),
    Variant("in-the-index-alone", bert, reindexed(lambda index: index.update({"cls.decoder.weight": SHARDS[0]}))),
    # Names and types of the same numbers.
    Variant("prefixed", bert, renamed(lambda name: f"bert.{name}")),
    Variant("gamma-and-beta", bert, renamed(lambda name: name.replace("Norm.weight", "Norm.gamma"))),
    Variant("float64", bert, cast(torch.float64)),
    Variant("float16", bert, cast(torch.float16)),
    Variant("bfloat16", bert, cast(torch.bfloat16)),
    Variant("position-ids", bert, put("embeddings.position_ids", torch.arange(128)[None])),
    Variant("head-of-pre-training", bert, put("cls.predictions.bias", torch.ones(3))),
    Variant("another-head", qwen3, edited(lambda weights: weights.update({"lm_head.weight": torch.ones(3, 3)}))),
    Variant("prefixed-xlm-roberta", xlm_roberta, renamed(lambda name: f"roberta.{name}"), texts=TEXTS[:4]),
    Variant("a-pooler-of-int8", bert, put("pooler.dense.weight", torch.ones(32, 32, dtype=torch.int8))),
    # What is refused: files.
    Variant("pickle", bert, instead("pytorch_model.bin"), "only pickled weights, which can run code"),
    Variant("pickles", bert, instead("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"), "pickled"),
    Variant("only-a-variant", bert, moved("model.fp16.safetensors"), "only a variant of the weights (model.fp16"),
    Variant("another-name", bert, moved("weights.safetensors"), "under other names than model.safetensors (weights."),
    Variant("below-a-folder", bert, moved("0_Transformer/model.safetensors"), "(0_Transformer/model.safetensors)"),
    Variant("gguf", bert, instead("tiny-q8_0.gguf"), "only GGUF, the format of llama.cpp (tiny-q8_0.gguf)"),
    Variant("gguf-alone", gguf_alone, refused="only GGUF, the format of llama.cpp (tiny-q8_0.gguf)"),
    Variant("onnx", bert, instead("onnx/model.onnx"), "an export to ONNX or OpenVINO (onnx/model.onnx)"),
    Variant("openvino", bert, instead("openvino_model.xml", "openvino_model.bin"), "an export to ONNX or OpenVINO"),
    Variant("tensorflow", bert, instead("tf_model.h5"), "only weights of TensorFlow or Flax (tf_model.h5)"),
    Variant("flax", bert, instead("flax_model.msgpack"), "only weights of TensorFlow or Flax (flax_model.msgpack)"),
    Variant("nothing", bert, instead(), "has no model.safetensors: choose a model or a revision that has it"),
    Variant("adapter-beside", bert, adapter, "adapter_config.json is a PEFT adapter's (LoRA or the like)"),
    Variant("adapter-alone", bert, adapter_alone, "of owner/base; adapters are not applied here. Merge it once"),
    Variant("truncated", bert, truncated, "model.safetensors cannot be loaded"),
    Variant("empty", bert, lambda folder: (folder / SINGLE).write_bytes(b""), "model.safetensors cannot be loaded"),
    Variant("twice-in-the-header", bert, twice_in_the_header, "model.safetensors cannot be loaded"),
    # What is refused: indexes.
    Variant(
        "a-file-that-is-missing",
        bert,
        reindexed(lambda index: index.update({BIAS: "model-00009-of-00009.safetensors"})),
        "lists 3 files, and model-00009-of-00009.safetensors is not in",
    ),
    Variant(
        "a-file-elsewhere",
        bert,
        reindexed(lambda index: index.update({BIAS: "../model.safetensors"})),
        "lists '../model.safetensors', which is not a file beside it",
    ),
    Variant(
        "in-another-file", bert, reindexed(lambda index: index.update({BIAS: SHARDS[0]})), f"says that {BIAS} is in"
    ),
    Variant("an-empty-index", bert, reindexed(lambda index: index.clear()), "has no `weight_map`"),
    Variant("in-both-shards", bert, in_both_shards, "both hold embeddings.LayerNorm.bias"),
    # What is refused: tensors.
    Variant("missing", bert, edited(lambda weights: weights.pop(BIAS)), f"1 missing ['{BIAS}']"),
    Variant("unknown", bert, put("encoder.layer.7.new.weight", torch.ones(3)), "1 unknown ['encoder.layer.7.new"),
    Variant("shape", bert, put(BIAS, torch.zeros(31)), f"{BIAS} has the shape (31,) instead of (32,)"),
    Variant("a-head", bert, put("classifier.weight", torch.ones(1, 32)), "`BertModel.from_pretrained(folder).save_"),
    Variant("another-prefix", bert, renamed(lambda name: f"roberta.{name}"), "37 missing ["),
    Variant("another-prefix-xlm-roberta", xlm_roberta, renamed(lambda name: f"bert.{name}"), "missing ["),
    Variant("beyond-float32", bert, put(BIAS, torch.full((32,), 1e300, dtype=torch.float64)), "which float32 does not"),
    Variant("one-number", bert, put(BIAS, torch.tensor(1.0)), f"{BIAS} has the shape () instead of (32,)"),
    Variant("not-finite", bert, put(BIAS, torch.full((32,), torch.inf)), f"{BIAS} has values that are not finite"),
    Variant("twice", bert, put(f"bert.{BIAS}", torch.ones(32)), f"{BIAS} are the same weight twice"),
    Variant("twice-by-prefix", qwen3, twice_by_prefix, "are the same weight twice"),
    Variant("int8", bert, put(BIAS, torch.ones(32, dtype=torch.int8)), f"weight {BIAS} is stored as I8"),
    Variant("fp8", bert, put(BIAS, torch.ones(32).to(torch.float8_e4m3fn)), f"weight {BIAS} is stored as F8_E4M3"),
    Variant(
        "gptq", bert, put("encoder.layer.0.output.dense.qweight", torch.ones(3, dtype=torch.int32)), "(GPTQ or AWQ)"
    ),
    Variant("bitsandbytes", bert, put("encoder.layer.0.output.dense.SCB", torch.ones(3)), "(bitsandbytes)"),
    Variant("fp8-scales", bert, put("encoder.layer.0.output.dense.weight_scale_inv", torch.ones(1)), "(FP8)"),
]
SERVED = [variant for variant in VARIANTS if variant.refused is None]
REFUSED = [variant for variant in VARIANTS if variant.refused is not None]


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(VARIANTS, tmp_path_factory.mktemp("variants")) as server:
        yield server


@pytest.mark.parametrize("variant", SERVED, ids=str)
async def test_equal(server: Served, variant: Variant) -> None:
    await server.assert_equal(variant)


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_refused(variant: Variant, tmp_path: Path) -> None:
    variant.assert_refused(tmp_path)
