"""Pickled weights into safetensors, once, where a person asks for it. Reads no tensors in this process.

A pickle is a program. `torch.load(weights_only=True)` runs only what builds tensors; beside that it runs in a process
of its own that has no network and no secrets, may not gain privileges, and may take so much memory, time and disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from vecmill.core.errors import StartupError
from vecmill.core.own_python import OWN_PYTHON
from vecmill.models.child_process import inherited_environment, limit_this_process
from vecmill.models.fingerprint import READ
from vecmill.models.modules import MODULES, trained_folders
from vecmill.models.weight_files import (
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    Listing,
    list_folder,
    read_header,
    read_index,
)

CLONE_NEWUSER, CLONE_NEWNET, PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 38
# Tied weights are written once for each name, so that the result may be larger than the file.
LARGEST_RESULT = 3  # times the file's size
SPARE_BYTES = 1_073_741_824  # of memory, beside the values
SPARE_SECONDS, BYTES_PER_SECOND = 60, 10_000_000
OPEN_FILES = 64
MADE_OF = ".made-of"  # beside the result: a hash of the files that it was made of
BLOCK_BYTES = 16_777_216
FORBIDDEN = re.compile(r"GLOBAL (\S+)")


def convert(named: str, folder: Path, target: Path, report: Callable[[str], None]) -> bool:
    """Write a folder with the weights of another in safetensors, and its other files.

    False where it was there already, made of the same files; one that was made of others is replaced.

    Args:
        named: what an error begins with.
        report: told of each file, and of what this system does not confine.

    Raises:
        StartupError: there is no pickle, it is not one of weights, or the disk is full.
    """
    listing = list_folder(named, folder, named)
    names = listing.pickles(lambda: read_index(folder / PICKLE_INDEX))
    heads = _heads(folder)
    try:
        made_of = _hash(folder, [*_small(folder), *(folder / name for name in names), *heads])
        if _is_made_of(target, made_of):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
            result = Path(temporary, "result")
            result.mkdir()
            _copy_small(folder, result)
            _convert_all(listing, folder, names, result, report)
            for head in heads:
                _convert_head(named, head, result / head.parent.relative_to(folder) / SINGLE, report)
            (result / MADE_OF).write_text(made_of, "utf-8")
            if target.exists():
                target.rename(Path(temporary, "before"))
            result.rename(target)
    except OSError as error:
        raise StartupError(
            f"{named}: {error.filename or target} cannot be written ({error.strerror}): make room or set HF_HOME."
        ) from None
    return True


def _heads(folder: Path) -> list[Path]:
    """The weights of sentence-transformers' modules: pickles too, where there is nothing else."""
    files = []
    for path in trained_folders(read_index(folder / MODULES)):
        kinds = (folder / path / name for name in (SINGLE, PICKLE))
        files += [file for file in kinds if file.is_file()][:1]
    return files


def _convert_head(named: str, head: Path, made: Path, report: Callable[[str], None]) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    if head.name == SINGLE:
        shutil.copyfile(head, made)
        return
    report(f"converting {head.parent.name}/{head.name} to {SINGLE}")
    _in_child(named, head, made)


def _hash(folder: Path, files: Iterable[Path]) -> str:
    """Of the content: a folder's weights may be replaced by others with the same name, size and time."""
    total = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            total.update(path.relative_to(folder).as_posix().encode())
            while block := file.read(BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def _is_made_of(target: Path, files: str) -> bool:
    try:
        return (target / MADE_OF).read_text("utf-8") == files
    except (OSError, ValueError):
        return False


def _small(folder: Path) -> list[Path]:
    paths = {path for pattern in (*READ, "*/config.json") for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and path.name not in (INDEX, PICKLE_INDEX))


def _copy_small(folder: Path, result: Path) -> None:
    for path in _small(folder):
        to = result / path.relative_to(folder)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def _convert_all(listing: Listing, folder: Path, names: list[str], result: Path, report: Callable[[str], None]) -> None:
    index: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        made = SINGLE if len(names) == 1 else f"model-{number:05}-of-{len(names):05}.safetensors"
        report(f"converting {name} to {made}")
        answer = _in_child(listing.named, folder / name, result / made)
        if number == 1 and not answer.get("confined"):
            report("this system gives an ordinary process no network of its own, so that the conversion had this one's")
        index |= dict.fromkeys(read_header(result / made), made)
    if len(names) > 1:
        content = {"metadata": {}, "weight_map": index}
        (result / INDEX).write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")


def _in_child(named: str, pickle: Path, made: Path) -> Mapping[str, Any]:
    size = pickle.stat().st_size
    with TemporaryDirectory(dir=made.parent.parent, prefix="unpickling-") as own:
        command = [*OWN_PYTHON, "-s", "-m", __name__, str(pickle.resolve()), str(made.resolve())]
        try:
            done = subprocess.run(  # noqa: S603  # our own interpreter, with two paths
                command,
                cwd=own,
                env={**inherited_environment(), "HOME": own, "TMPDIR": own, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_seconds(size),
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StartupError(f"{named}: {pickle.name} took longer than {_seconds(size):,} s to convert.") from None
    result: Mapping[str, Any] = {}
    with suppress(ValueError, IndexError):
        result = json.loads(done.stdout.splitlines()[-1])
    if done.returncode != 0 or "problem" in result:
        problem = result.get("problem") or "ended its process, as a file does that needs more than it may have"
        raise StartupError(f"{named}: {pickle.name} {problem}; it is not converted.")
    return result


def _seconds(size: int) -> int:
    return SPARE_SECONDS + size // BYTES_PER_SECOND


def main() -> None:
    """The process of its own: the pickle, and where the safetensors go."""
    pickle, made = sys.argv[1], sys.argv[2]
    size = os.stat(pickle).st_size
    result: dict[str, Any] = {"confined": _leave_network()}  # before torch is imported: it may start threads
    import torch  # this process alone has it

    torch.set_num_threads(1)
    limit_this_process(
        memory_bytes=(1 + 2 * LARGEST_RESULT) * size + SPARE_BYTES,
        cpu_seconds=_seconds(size),
        file_bytes=LARGEST_RESULT * size + SPARE_BYTES // 1024,
        open_files=OPEN_FILES,
    )
    try:
        _write(pickle, made, LARGEST_RESULT * size)
    except Exception as error:
        result["problem"] = _problem(error)
    sys.stdout.write(json.dumps(result) + "\n")


def _leave_network() -> bool:
    """Give this process an empty network and no privileges; whether the system does the former."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return any(library.unshare(flags) == 0 for flags in (CLONE_NEWUSER | CLONE_NEWNET, CLONE_NEWNET))
    except (AttributeError, OSError, TypeError):  # not Linux
        return False


def _write(pickle: str, made: str, largest: int) -> None:
    import torch
    from safetensors.torch import save_file

    weights: Any = torch.load(pickle, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickle))
    if not isinstance(weights, dict) or not weights:
        raise ValueError("is not a table of weights by name")
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise ValueError("has something else in it than weights by name")
        largest -= tensor.numel() * tensor.element_size()
        if largest < 0:
            raise ValueError("says that it has more values than are in it")
        where = tensor.untyped_storage().data_ptr()
        # safetensors holds each tensor by itself: tied ones are written once for each name.
        tensors[name] = tensor.detach().clone() if where in seen else tensor.detach().contiguous()
        seen.add(where)
    save_file(tensors, made, metadata={"format": "pt"})


def _problem(error: Exception) -> str:
    if global_name := FORBIDDEN.search(str(error)):
        return f"asks for `{global_name[1]}` when it is loaded, which no weights need: it may be hostile"
    if isinstance(error, ValueError) and error.args and str(error).startswith(("is not", "has some", "says that")):
        return str(error)
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return "takes more memory than its size allows"
    return f"is damaged or no pickle of weights ({type(error).__name__})"


if __name__ == "__main__":
    main()
