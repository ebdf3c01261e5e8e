"""Weights from safetensors into a network: read tensor by tensor, nothing missing, nothing left over.

transformers' own loading maps whole files into memory and copies from there, which doubles the memory taken where
CPU and GPU share it, and it warns of what is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vecmill.core.errors import StartupError
from vecmill.models import bert
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.merged_projections import Rows, merge_projections
from vecmill.models.modules import Head
from vecmill.models.weight_files import (
    SINGLE,
    Header,
    data_start,
    read_header,
    refuse_misplaced,
    refuse_quantised,
    refuse_type,
)

FORGET_EVERY = 268_435_456  # bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Where weights go: one for each start of the server."""

    dtype: torch.dtype
    device: torch.device
    progress: Callable[[int], None] = lambda read: None
    """Told how many bytes of the checkpoint have been read since the last call."""
    shared: dict[tuple[Path, str], nn.Module] = field(default_factory=dict)
    """What was loaded before: a folder named twice is loaded once."""
    read: dict[tuple[Path, str], Mapping[str, str]] = field(default_factory=dict)
    """What was read for each of them, for the fingerprint of who shares it."""

    def on(self, device: torch.device) -> Target:
        """The same on another device."""
        return replace(self, device=device)


# refuse_type lets no others pass.
TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ_AT_ONCE = 67_108_864  # bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in its file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Bytes from the file's beginning."""
    size: int
    """Bytes."""

    @classmethod
    def of(cls, tensor: Mapping[str, Any], data_start: int) -> _Place:
        """From its entry in the file's header, which the library has checked."""
        first, end = tensor["data_offsets"]
        return cls(str(tensor["dtype"]), tuple(tensor["shape"]), data_start + first, end - first)


class WeightFiles:
    """The safetensors of a checkpoint, or of one of its heads."""

    def __init__(self, checkpoint: Checkpoint, head: Head | None = None) -> None:
        """Open the files' headers.

        Raises:
            StartupError: there is no such file, or one is damaged.
        """
        self._checkpoint = checkpoint
        self._within = "" if head is None else f"{head.path}/"
        self.files: dict[str, Path] = {}
        self._places: dict[str, _Place] = {}
        paths = checkpoint.weight_files if head is None else [checkpoint.head_file(head)]
        for path in paths:
            self._add(path)
        if paths[0].name != SINGLE:
            refuse_misplaced(checkpoint.named, checkpoint.weight_index()["weight_map"], self.files)

    def _add(self, path: Path) -> None:
        with self._open(path):  # the library checks the file's size and the tensors' places
            header = self._header(path)
        refuse_quantised(self._checkpoint.named, header)
        if twice := sorted(self.files.keys() & header.keys()):
            raise StartupError(
                f"{self._checkpoint.named}: {self.files[twice[0]].name} and {path.name} both hold {twice[0]}, so that "
                f"it is not known which one counts; fetch the model again."
            )
        self.files |= dict.fromkeys(header, path)
        start = data_start(path)
        self._places |= {name: _Place.of(tensor, start) for name, tensor in header.items()}

    def _header(self, path: Path) -> Header:
        try:
            return read_header(path)
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from None

    def _open(self, path: Path) -> Any:
        try:
            # pread: each tensor is read into memory of its own; a mapped file would stay beside the copies.
            return safe_open(path, framework="pt", backend="pread")
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, error) from None

    def _damaged(self, path: Path, error: Exception) -> StartupError:
        return StartupError(f"{self._checkpoint.named}: {path.name} cannot be loaded ({error}); fetch the model again.")

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a tensor in its file; None for a type that `tensors` refuses."""
        return TORCH_TYPES.get(self._places[name].dtype)

    def tensors(
        self, names: Sequence[str], dtype: torch.dtype, copied: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, on the CPU in the file's type; each is forgotten when the next is asked for.

        Each is hashed while its values are looked at and copied, for the checkpoint's fingerprint.

        Args:
            dtype: what they will be cast to.
            copied: those that the caller copies before it asks for the next. They are all read into one buffer: buffers
                that are freed between tensors which stay leave holes that malloc does not give back, up to a third of a
                model's size.

        Raises:
            StartupError: a value is not a finite floating-point number, or would not be one in `dtype`.
        """
        shared = torch.empty(max((self._places[name].size for name in copied), default=0), dtype=torch.uint8)
        for path in dict.fromkeys(self.files[name] for name in names):
            unforgotten = 0
            with self._opened(path) as opened, ThreadPoolExecutor(1, "weights-hash") as hasher:
                for name in (name for name in names if self.files[name] == path):
                    tensor = self._read(name, opened, shared if name in copied else None)
                    hashed = hasher.submit(self.note, name, tensor)
                    unforgotten += tensor.numel() * tensor.element_size()
                    if unforgotten > FORGET_EVERY:
                        _forget_pages(path)
                        unforgotten = 0
                    yield name, self._finite(name, tensor, dtype)
                    hashed.result()
            _forget_pages(path)

    def note(self, name: str, tensor: Tensor) -> None:
        """Count a tensor's values into the checkpoint's fingerprint."""
        values = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._checkpoint.fingerprint.add(f"{self._within}{name} {tensor.dtype} {tuple(tensor.shape)}", values)

    def _opened(self, path: Path) -> FileIO:
        try:
            return FileIO(path)
        except OSError as error:
            raise self._damaged(path, error) from None

    def _read(self, name: str, opened: FileIO, into: Tensor | None) -> Tensor:
        """A whole tensor, in memory of its own or at the beginning of `into`.

        The library's own way holds the interpreter for as long as it reads, and with it everybody whom the server
        answers meanwhile: 1.6 s for 600 MB.
        """
        place = self._places[name]
        refuse_type(self._checkpoint.named, name, place.dtype)
        buffer = torch.empty(place.size, dtype=torch.uint8) if into is None else into[: place.size]
        view, done = buffer.numpy().data, 0
        try:
            opened.seek(place.start)
            while done < place.size:
                count = opened.readinto(view[done : done + READ_AT_ONCE])
                if not count:
                    raise OSError("it ends too early")
                done += count
        except OSError as error:
            raise self._damaged(self.files[name], error) from None
        return buffer.view(TORCH_TYPES[place.dtype]).view(place.shape)

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        refuse_type(self._checkpoint.named, name, self._places[name].dtype)
        return tensor

    def shape(self, name: str) -> Sequence[int]:
        """Of a tensor, from its file's header. Raises StartupError as `part`."""
        with self._open(self._file(name)) as opened:
            shape: Sequence[int] = opened.get_slice(name).get_shape()
            return shape

    def part(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """Some rows and columns of a tensor, in float32.

        Raises:
            StartupError: there is no such tensor, or a value is not finite.
        """
        with self._open(self._file(name)) as opened:
            stored = opened.get_slice(name)
            part = self._typed(name, stored[rows] if columns is None else stored[rows, columns])
            self.note(f"{name}[{rows}, {columns}]", part)
            return self._finite(name, part, torch.float32).float()

    def refuse_unknown(self, prefix: str, known: Collection[str]) -> None:
        """Raise StartupError where a name with the prefix is not known."""
        if unknown := sorted(name for name in self.files if name.startswith(prefix) and name not in known):
            raise StartupError(f"{self._checkpoint.named}: {len(unknown)} unknown weights {self._shown(unknown)}.")

    def _shown(self, names: Sequence[str]) -> list[str]:
        return [f"{self._within}{name}" for name in names[:3]]

    def unfit(self, problem: str) -> StartupError:
        """The error for weights that are others than config.json says."""
        return StartupError(f"{self._checkpoint.named}: {problem}; fetch the model again.")

    def _file(self, name: str) -> Path:
        if name not in self.files:
            missing = f"{self._within}{name}"
            raise StartupError(f"{self._checkpoint.named}: 1 weight is missing: {missing}; fetch the model again.")
        return self.files[name]

    def _finite(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.is_floating_point() and tensor.numel():
            lowest, highest = tensor.aminmax()  # both are NaN where one value is; no temporary of the tensor's size
            if not (lowest.isfinite() and highest.isfinite()):
                raise StartupError(f"{self._checkpoint.named}: weight {name} has values that are not finite.")
            if not (lowest.to(dtype).isfinite() and highest.to(dtype).isfinite()):
                kind = str(dtype).removeprefix("torch.")
                cure = "set DTYPE to bfloat16 or float32" if dtype is torch.float16 else "fetch the model again"
                raise StartupError(
                    f"{self._checkpoint.named}: weight {name} has values from {lowest:.3g} to {highest:.3g}, which "
                    f"{kind} does not reach: {cure}."
                )
        return tensor


def _forget_pages(path: Path) -> None:
    """Let the kernel drop the file's pages: where CPU and GPU share memory, CUDA counts them as taken."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _builder(checkpoint: Checkpoint) -> Any:
    """The module that makes the checkpoint's network."""
    own = checkpoint.network.model_class in bert.CLASSES
    return bert if own else import_module("vecmill.models.transformers_networks")


def make_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a checkpoint's network: an object whose attributes are called as transformers has them.

    Raises:
        StartupError: the class does not accept what config.json says.
    """
    builder = _builder(checkpoint)
    try:
        config = builder.make_config(checkpoint)
    except Exception as error:  # whatever the class raises, the file is at fault
        raise _unaccepted(checkpoint, error) from None
    return config


def _unaccepted(checkpoint: Checkpoint, error: Exception) -> StartupError:
    """For a config.json that a class refuses, in one sentence."""
    reason = " ".join((str(error) or type(error).__name__).split())
    return StartupError(f"{checkpoint.named}: {checkpoint.folder}/config.json cannot be right ({reason[:300]}).")


def load_weights(checkpoint: Checkpoint, config: Any, target: Target) -> Any:
    """The checkpoint's network on the target's device, with its weights.

    Args:
        config: as `make_config` makes it.

    Raises:
        StartupError: a weight is missing, unknown or of the wrong shape, or a value is not finite.
    """
    key = (checkpoint.folder.resolve(), checkpoint.network.model_class)
    if key not in target.shared:
        builder = _builder(checkpoint)
        if checkpoint.network.layout is not None:
            config.update(checkpoint.network.layout(WeightFiles(checkpoint).files))
        try:
            model = builder.make_model(checkpoint, config)
        except Exception as error:
            raise _unaccepted(checkpoint, error) from None
        _fill(model, checkpoint, target)
        model = builder.complete(model, checkpoint)
        target.shared[key] = model.to(target.device).eval()  # the buffers
        target.read[key] = dict(checkpoint.fingerprint.parts)
    checkpoint.fingerprint.include(target.read.get(key, {}))
    return target.shared[key]


def _fill(model: nn.Module, checkpoint: Checkpoint, target: Target) -> None:
    weights = WeightFiles(checkpoint)
    places = {name: checkpoint.network.rename(name) for name in weights.files}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}  # buffers that are stored, too
    _refuse_others(model, checkpoint, wanted.keys(), places)
    merged = merge_projections(model, checkpoint.network.merged)

    def dtype_at(place: str) -> torch.dtype:
        return torch.float32 if place.endswith(checkpoint.network.in_float32) else target.dtype

    def is_copied(name: str) -> bool:
        """Whether `_set` copies all of a tensor's parts: none keeps the memory that it was read into."""
        stays = target.device.type == "cpu"
        return not any(
            stays and place not in merged and weights.dtype(name) is dtype_at(place) for place in places[name]
        )

    names = [name for name, several in places.items() if several]
    for name, tensor in weights.tensors(names, target.dtype, frozenset(filter(is_copied, names))):
        # A single number, or fewer rows than places: no parts of it have the shape.
        parts = tensor.tensor_split(len(places[name])) if tensor.ndim else [tensor] * len(places[name])
        for place, part in zip(places[name], parts, strict=True):
            if part.shape != wanted[place]:
                shapes = f"{tuple(part.shape)} instead of {tuple(wanted[place])}"
                raise _unfit(model, checkpoint, f"{place} has the shape {shapes}")
            _set(model, merged.get(place, place), part, target.device, dtype_at(place))
        target.progress(tensor.numel() * tensor.element_size())


def _refuse_others(
    model: nn.Module, checkpoint: Checkpoint, wanted: Set[str], places: Mapping[str, Sequence[str]]
) -> None:
    """Raise StartupError unless the files hold each of the network's weights once, and no others."""
    stored = {place for several in places.values() for place in several}
    _refuse_twice(checkpoint, places)
    if missing := sorted(wanted - stored):
        raise _unfit(model, checkpoint, f"{len(missing)} missing {missing[:3]}")
    if unknown := sorted(name for name, several in places.items() if not set(several) <= wanted):
        cure = "fetch the model again"
        if _builder(checkpoint).is_of_transformers(name := type(model).__name__):
            cure += f", or `{name}.from_pretrained(folder).save_pretrained(folder)` leaves out what it does not read"
        raise _unfit(model, checkpoint, f"{len(unknown)} unknown {unknown[:3]}", cure)


def _refuse_twice(checkpoint: Checkpoint, places: Mapping[str, Sequence[str]]) -> None:
    """Two names in the files may stand for one weight, as with and without a prefix."""
    first: dict[str, str] = {}
    for name, several in places.items():
        for place in several:
            if (other := first.setdefault(place, name)) != name:
                raise StartupError(
                    f"{checkpoint.named}: {other} and {name} are the same weight twice, so that it is not known which "
                    f"one counts; fetch the model again."
                )


def _set(model: nn.Module, place: str | Rows, part: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Put a tensor where a parameter is, or into some rows of one."""
    rows = place if isinstance(place, Rows) else None
    module_name, _, leaf = (rows.parameter if rows else str(place)).rpartition(".")
    module = model.get_submodule(module_name)
    parameter: Tensor = getattr(module, leaf)
    if rows is None:
        placed = part.to(device, dtype)
        is_buffer = leaf in dict(module.named_buffers(recurse=False))
        setattr(module, leaf, placed if is_buffer else nn.Parameter(placed, requires_grad=False))
        return
    if parameter.device != device or parameter.dtype != dtype:  # the first of its parts
        parameter = nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype), requires_grad=False)
        setattr(module, leaf, parameter)
    parameter.data[rows.start : rows.stop].copy_(part)


def _unfit(model: nn.Module, checkpoint: Checkpoint, problem: str, cure: str = "fetch the model again") -> StartupError:
    return StartupError(f"{checkpoint.named}: the weights do not fit {type(model).__name__}: {problem}; {cure}.")
