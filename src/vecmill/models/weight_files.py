"""Which of a repository's or folder's files are its weights, and what their headers say. Reads no tensors.

The choice is that of transformers' `from_pretrained`: `model.safetensors`, else the files that
`model.safetensors.index.json` lists; whatever lies beside them is not read.

Sources: https://huggingface.co/docs/safetensors#format, transformers.modeling_utils._get_resolved_checkpoint_files
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from vecmill.core.errors import StartupError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

LENGTH_BYTES = 8  # little-endian, before the header
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit

Header = Mapping[str, Mapping[str, Any]]
"""A file's tensors by name: `dtype`, `shape` and `data_offsets`."""

# What a repository may hold in place of the weights that are read here, and what to do about it: patterns of names,
# what they are, the cure. The first that fits is named.
OTHERS = (
    (
        ("model.*.safetensors", "model.*.safetensors.index.json"),
        "only a variant of the weights",
        f"in a folder of your own rename it to {SINGLE} (an index to {INDEX}), and serve that",
    ),
    (
        ("model-*-of-*.safetensors",),
        f"parts of the weights without {INDEX}",
        "fetch the model again",
    ),
    (
        (PICKLE, PICKLE_INDEX, "pytorch_model-*-of-*.bin", "pytorch_model.*.bin"),
        "only pickled weights, which can run code when they are loaded",
        "`vecmill pull {model}` looks for a revision that has it, and with `--convert-pickle` converts them once",
    ),
    (
        ("*.safetensors",),
        f"safetensors under other names than {SINGLE}",
        "take the repository's conversion for transformers, which has it",
    ),
    (("*.gguf",), "only GGUF, the format of llama.cpp", "take the repository that it was converted from"),
    (
        ("*.onnx", "openvino_model.xml", "*/*.onnx", "*/openvino_model.xml"),
        "only an export to ONNX or OpenVINO",
        "take the repository that it was exported from",
    ),
    (
        ("tf_model*.h5", "*.ckpt*", "flax_model*.msgpack", "saved_model.pb"),
        "only weights of TensorFlow or Flax",
        "load it with `from_tf=True` or `from_flax=True` in transformers 4, and `save_pretrained` it as safetensors",
    ),
)
# How a weight's name ends where it is stored quantised, and with what.
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".input_scale": "FP8",
    "._data": "quanto",
}
FLOATING = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Listing:
    """A model's files, none of them read yet."""

    named: str
    """What an error begins with: the setting that names the model, or its id."""
    where: str
    """The folder or the repository, for the error."""
    model: str
    """What `vecmill pull` would be given."""
    present: Collection[str]
    """Paths relative to where."""

    def chosen(self, read_index: Callable[[], Any]) -> list[str]:
        """The names of the weight files, sorted.

        Args:
            read_index: gives the content of `model.safetensors.index.json`; called only where that is what counts.

        Raises:
            StartupError: there are none, or the index names a file that is not there; the sentence says what helps.
        """
        if adapters := [name for name in ADAPTERS if name in self.present]:
            raise _adapter(self.named, adapters[0], None)
        if SINGLE in self.present:
            return [SINGLE]
        if INDEX not in self.present:
            raise self.refusal()
        return self._listed(INDEX, read_index())

    def pickles(self, read_index: Callable[[], Any]) -> list[str]:
        """The names of the pickled weights, where there are no others; `read_index` is of their index.

        Raises:
            StartupError: there are none either, or the index names a file that is not there.
        """
        if PICKLE in self.present:
            return [PICKLE]
        if PICKLE_INDEX not in self.present:
            raise self.refusal()
        return self._listed(PICKLE_INDEX, read_index())

    @property
    def readable(self) -> bool:
        """Whether it has the weights that are read here."""
        return SINGLE in self.present or INDEX in self.present

    @property
    def pickled(self) -> bool:
        """Whether pickles are what it has in place of them."""
        return not self.readable and (PICKLE in self.present or PICKLE_INDEX in self.present)

    def _listed(self, file: str, index: Any) -> list[str]:
        """The files that an index lists."""
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise StartupError(f"{self.named}: {file} has no `weight_map` of tensors to files; fetch the model again.")
        names = sorted(set(listed.values()))
        if outside := [name for name in names if PurePosixPath(name).name != name]:
            raise StartupError(f"{self.named}: {file} lists {outside[0]!r}, which is not a file beside it.")
        if missing := [name for name in names if name not in self.present]:
            raise StartupError(
                f"{self.named}: {file} lists {len(names)} files, and {', '.join(missing[:3])} is not in "
                f"{self.where}; fetch the model again."
            )
        return names

    def refusal(self, cure: str = "") -> StartupError:
        """The error for a model without readable weights. `cure` replaces the usual advice for the files it has."""
        what, usual = self.instead or (f"no {SINGLE}", "choose a model or a revision that has it")
        return StartupError(f"{self.named}: {self.where} has {what}: {cure or usual}.")

    @property
    def instead(self) -> tuple[str, str] | None:
        """Which other weights the model has, and what to do about them; None: it has no weights that are known here."""
        for patterns, what, cure in OTHERS:
            if names := sorted(name for name in self.present if any(fnmatchcase(name, each) for each in patterns)):
                return f"{what} ({names[0]}), not {SINGLE}", cure.format(model=self.model)
        return None


def list_folder(named: str, folder: Path, model: str) -> Listing:
    """The files of a folder and of the folders in it."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return Listing(named, str(folder), model, [path.relative_to(folder).as_posix() for path in paths])


def read_index(index: Path) -> Any:
    """What an index of weights holds; None where it cannot be read: `Listing` then reports a missing `weight_map`."""
    try:
        return json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def refuse_other_formats(named: str, folder: Path) -> None:
    """Raise StartupError for a folder without config.json that holds weights of another kind, such as GGUF."""
    listing = list_folder(named, folder, str(folder))
    if "config.json" not in listing.present and not listing.readable and listing.instead:
        raise listing.refusal()


def refuse_adapter(named: str, folder: Path) -> None:
    """Raise StartupError where an adapter lies in place of or beside the weights: transformers would apply it."""
    adapters = [name for name in ADAPTERS if (folder / name).is_file()]
    if not adapters:
        return
    config: Any = {}
    with suppress(OSError, ValueError, RecursionError):  # damaged: it is an adapter all the same
        config = json.loads((folder / ADAPTERS[0]).read_text("utf-8"))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    raise _adapter(named, adapters[0], base)


def _adapter(named: str, file: str, base: str | None) -> StartupError:
    return StartupError(
        f"{named}: {file} is a PEFT adapter's (LoRA or the like), which changes the weights of "
        f"{base or 'its base model'}; adapters are not applied here. Merge it once, in Python with peft: "
        f"`PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged)`; copy the files of the "
        f"tokenizer and of sentence-transformers to `merged`, and serve that."
    )


def no_head_file(named: str, file: str, model: str, *, pickled: bool) -> StartupError:
    """The error for a module of sentence-transformers without its `file`, whose weights may be pickled instead."""
    if not pickled:
        return StartupError(f"{named}: {file} is missing, the weights of a module: fetch the model again.")
    return StartupError(
        f"{named}: {PurePosixPath(file).parent}/ has only a pickle ({PICKLE}), not {SINGLE}: write it once, in Python "
        f'with sentence-transformers: `SentenceTransformer("{model}").save_pretrained(folder)`, and serve that folder.'
    )


def refuse_misplaced(named: str, index: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Raise StartupError where a tensor is in another file than its index says: one of the two is of another save.

    What the index does not list is read as transformers reads it; what it lists and no file has may be a duplicate
    that a conversion has left out, and is missing only where it is needed.
    """
    for name, listed in index.items():
        if name in files and files[name].name != listed:
            raise StartupError(
                f"{named}: {INDEX} says that {name} is in {listed}, and it is in {files[name].name}; fetch the model "
                f"again."
            )


def refuse_quantised(named: str, header: Header) -> None:
    """Raise StartupError where names tell of weights that are stored quantised."""
    for name in header:
        for ending, method in QUANTISED.items():
            if name.endswith(ending):
                raise StartupError(
                    f"{named}: weight {name} is a part of a quantised weight ({method}), which is not read here: serve "
                    f"the model that it was made from, in float32, float16 or bfloat16."
                )


def refuse_type(named: str, name: str, dtype: str) -> None:
    """Raise StartupError where a weight that is used does not hold plain floating-point numbers."""
    if dtype not in FLOATING:
        raise StartupError(
            f"{named}: weight {name} is stored as {dtype}; {', '.join(FLOATING)} are read. It is quantised or not a "
            f"weight: serve the model that it was made from, in float32, float16 or bfloat16."
        )


def parameters(files: Iterable[Path]) -> int:
    """The elements of all tensors in safetensors files.

    Raises:
        OSError: one cannot be read.
        ValueError: one is damaged.
    """
    return sum(math.prod(tensor["shape"]) for file in files for tensor in read_header(file).values())


NUMBERED = re.compile(r"\.\d+\..*\.weight$", re.ASCII)  # a weight of one of the repeated blocks
ALIGNED = 16  # both sizes of a weight are multiples of it, or the kernels for float8 do not take it


def linear_parameters(files: Iterable[Path], used: Callable[[str], object] = bool) -> tuple[int, int]:
    """The elements of the weights that may be rounded to float8, as far as names and shapes tell, and their rows.

    Args:
        used: whether the network has a weight, by its name in the files.

    Raises:
        OSError, ValueError: as `parameters`.
    """
    elements = rows = 0
    for file in files:
        for name, tensor in read_header(file).items():
            shape = tensor["shape"]
            if len(shape) == 2 and NUMBERED.search(name) and used(name) and not any(each % ALIGNED for each in shape):
                elements, rows = elements + math.prod(shape), rows + shape[0]
    return elements, rows


def read_header(file: Path) -> Header:
    """What a safetensors file says of its tensors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or names a tensor twice.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file.name} is not a safetensors file")
        try:
            header: dict[str, dict[str, Any]] = json.loads(opened.read(length), object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError(f"the header of {file.name} is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError(f"the header of {file.name} is no object")
    header.pop("__metadata__", None)
    if damaged := next((name for name, tensor in header.items() if not _is_tensor(tensor)), None):
        raise ValueError(f"the header of {file.name} has no type, shape and place of the tensor {damaged[:100]!r}")
    return header


def _is_tensor(entry: Any) -> bool:
    """Whether an entry of a header says what safetensors needs of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    return (
        isinstance(shape, list)
        and isinstance(place, list)
        and len(place) == 2
        and all(type(number) is int and number >= 0 for number in (*shape, *place))
    )


def data_start(file: Path) -> int:
    """Where the tensors' bytes begin in a safetensors file. Raises OSError."""
    with file.open("rb") as opened:
        return LENGTH_BYTES + int.from_bytes(opened.read(LENGTH_BYTES), "little")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it names a tensor twice")
    return content
