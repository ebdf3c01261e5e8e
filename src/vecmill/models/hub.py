"""The hub: what a repository holds, how much of it is missing here, and fetching that."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's in 1.x and httpx2's in 2.x
    CachedRepoTreeNotFoundError,
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # public, but not in __all__
from huggingface_hub.utils.tqdm import tqdm
from rich.filesize import decimal

from vecmill.core.errors import StartupError, StartupObstacle
from vecmill.models.modules import MODULES, trained_folders
from vecmill.models.weight_files import (
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    Listing,
    list_folder,
    no_head_file,
    read_index,
)

logger = logging.getLogger(__name__)

REPOSITORY = "the repository"
CONFIG = "config.json"
SMALL_FILES = ["*.json", "*.jinja", "*/config.json"]
TOKENIZER = "tokenizer.json"
# What a tokenizer is made of where there is no tokenizer.json; `*.json` has the others.
VOCABULARIES = ["vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"]
DUPLICATES = ["onnx/*", "openvino/*", "original/*", "consolidated*.safetensors"]  # the same weights in other formats

HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # RuntimeError and ValueError: hf_xet, and its absence
NON_COMMERCIAL = re.compile(r"-nc(-|$)")
BFLOAT16_BYTES = 2
INFO_TIMEOUT = 30.0  # seconds
CONVERTER = "SFconvertbot"  # the hub's own, which opens pull requests with safetensors
MOST_TRIED, MOST_OFFERED, MOST_REQUESTS = 10, 3, 100

Report = Callable[[int, int], None]
"""Called with the bytes fetched and the files that are complete, from any thread. May raise to stop the download."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on the hub at one commit: the files that are needed, and which of them are not in the cache."""

    name: str
    commit: str
    sizes: dict[str, int | None]
    """Bytes of each needed file; None where the hub does not say."""
    missing: dict[str, int]
    """Bytes of each file that is still to be fetched."""
    weights: list[str]
    """Those of the files that are the weights."""
    licence: str
    parameters: int | None

    @property
    def size(self) -> int:
        """Bytes of all needed files."""
        return sum(size or 0 for size in self.sizes.values())

    @property
    def missing_size(self) -> int:
        """Bytes still to be fetched."""
        return sum(self.missing.values())

    @property
    def readable(self) -> bool:
        """Whether the weights are safetensors; else they are pickles, to be converted."""
        return all(path.endswith(".safetensors") for path in self.weights)

    @property
    def non_commercial(self) -> bool:
        """Whether the licence's name says so; a licence without `-nc` may still forbid it in its text."""
        return any(NON_COMMERCIAL.search(word) for word in re.split(r"[\s,()]+", self.licence.lower()))

    @property
    def memory(self) -> int:
        """Bytes of the weights in bfloat16. From the files' sizes, which are larger where they hold float32."""
        if self.parameters is not None:
            return self.parameters * BFLOAT16_BYTES
        return self.weights_size

    @property
    def weights_size(self) -> int:
        """Bytes of the weight files."""
        return sum(self.sizes.get(path) or 0 for path in self.weights)


def download(
    name: str,
    *,
    hf_token: str | None,
    revision: str | None = None,
    check: Callable[[Path], object] = lambda folder: None,
    report: Report = lambda fetched, complete: None,
) -> Path:
    """The folder of a model to serve: from the cache where it is complete, else from the hub.

    A complete model is served without asking the hub, so that a restart serves what it served before. `check` sees the
    folder before its weights are fetched, and raises where they would be of no use.

    Raises:
        StartupError: it is not in the cache and the hub does not give it; the sentence says what would help.
    """
    if (folder := cached(name, revision)) is not None:
        return folder
    try:
        small = _fetched(name, revision, hf_token, SMALL_FILES, report)
        if not (small / CONFIG).is_file():
            _weights_of(name, small)  # says what it is instead, such as GGUF
        needed = _beside_weights(has_tokenizer=(small / TOKENIZER).is_file())
        if needed != SMALL_FILES:
            small = _fetched(name, revision, hf_token, needed, report)
        check(small)
        weights = [*_weights_of(name, small), *_heads_of(name, small)]
        return _fetched(name, revision, hf_token, [*needed, *weights], report)
    except HUB_ERRORS as error:
        logger.debug("hub: %s", error)
        raise (StartupError if _is_final(error) else StartupObstacle)(
            f"{name}: not a folder, not in the hub's cache (HF_HOME), and the hub gave no answer for it "
            f"({type(error).__name__}): check the name, the network, HF_HUB_OFFLINE and, for a gated model, HF_TOKEN."
        ) from None


def _beside_weights(*, has_tokenizer: bool) -> list[str]:
    """The files that are needed beside the weights: vocabularies only where there is no tokenizer.json."""
    return SMALL_FILES if has_tokenizer else [*SMALL_FILES, *VOCABULARIES]


def _is_final(error: Exception) -> bool:
    """Whether the hub, asked again with the same settings, would say the same."""
    named_wrongly = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)
    return isinstance(error, named_wrongly) or is_offline_mode()


def _fetched(name: str, revision: str | None, hf_token: str | None, patterns: list[str], report: Report) -> Path:
    return Path(
        snapshot_download(
            name,
            revision=revision,
            token=hf_token,
            allow_patterns=patterns,
            ignore_patterns=DUPLICATES,
            tqdm_class=_counting_bar(report),
        )
    )


def _weights_of(name: str, snapshot: Path) -> list[str]:
    """The weight files of the commit whose small files are in the snapshot."""
    return _listing(name, snapshot).chosen(lambda: read_index(snapshot / INDEX))


def _heads_of(name: str, snapshot: Path) -> list[str]:
    """The weight files of its modules. Raises StartupError where there is one that has none."""
    files, present = _head_files(snapshot / MODULES), _listing(name, snapshot).present
    for file in files:
        if file not in present:
            pickled = f"{file.removesuffix(SINGLE)}{PICKLE}" in present
            raise no_head_file(name, file, name, pickled=pickled)
    return files


def _listing(name: str, snapshot: Path) -> Listing:
    try:
        present = [file.path for file in get_cached_repo_tree(name, revision=snapshot.name)]
        return Listing(name, REPOSITORY, name, present)
    except CachedRepoTreeNotFoundError:  # another program's folder, and the hub cannot be asked: what is there counts
        return list_folder(name, snapshot, name)


def _head_files(modules: Path) -> list[str]:
    """The weights of the modules in a modules.json, which need not be there."""
    return [f"{folder}/{SINGLE}" for folder in trained_folders(read_index(modules))]


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is complete in the cache, else None. Asks nobody.

    Of a repository that has no safetensors it is the folder with those that were made of its pickles, if they were.
    """
    try:
        # Without the commit's listing a folder with one file, as another program leaves it, would pass as complete.
        present = [file.path for file in get_cached_repo_tree(name, revision=revision)]
        needed = _beside_weights(has_tokenizer=TOKENIZER in present)
        small = _here(name, revision, needed)
        try:
            weights = _weights_of(name, small)
        except StartupError:  # reported when the folder is read
            made = converted(name, small.name)
            return made if list_folder(name, made, name).readable else small
        return _here(name, revision, [*needed, *weights, *_head_files(small / MODULES)])
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None


def listed_in_cache() -> list[str]:
    """The ids of the models of which something is in the cache, whole or not. Asks nobody."""
    folders = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    names = (folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders if folder.is_dir())
    return sorted(name for name in names if name.count("/") == 1 and "--" not in name)


def _here(name: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=DUPLICATES, local_files_only=True
        )
    )


def converted(name: str, commit: str) -> Path:
    """Where a model's safetensors are that were made of its pickles; not in the hub's cache, which has the hub's."""
    return Path(constants.HF_HOME) / "vecmill" / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def converted_folder(folder: Path) -> Path:
    """The same for a folder that is not the hub's: the last part of its name is what it is called."""
    path = folder.resolve()
    return Path(constants.HF_HOME) / "vecmill" / "folders" / sha256(str(path).encode()).hexdigest()[:12] / path.name


def plan(name: str, *, hf_token: str | None, revision: str | None = None, pickles: bool = False) -> Plan:
    """Ask the hub what a model is and what of it is missing here. Fetches no file, but for an index of weights.

    Args:
        pickles: also a model that has only pickled weights, which are to be converted.

    Raises:
        StartupError: the hub does not give it, or it has no safetensors; the sentence says what would help.
    """
    if is_offline_mode():
        raise StartupError(f"{name}: HF_HUB_OFFLINE=1 forbids asking the hub: unset it to pull a model.")
    try:
        api = HfApi(token=hf_token)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=INFO_TIMEOUT)
        commit = str(info.sha)
        weights = _weights_on_hub(api, name, info, pickles=pickles)
        present = {file.rfilename for file in info.siblings or []}
        weights += _heads_on_hub(api, name, info, present, pickles=pickles)
        needed = [*_beside_weights(has_tokenizer=TOKENIZER in present), *weights]
        # The commit, not the branch: a dry run must not move the cache's idea of where the branch is.
        files = snapshot_download(
            name,
            revision=commit,
            token=hf_token,
            allow_patterns=needed,
            ignore_patterns=DUPLICATES,
            tqdm_class=_counting_bar(lambda fetched, complete: None),
            dry_run=True,
        )
    except HUB_ERRORS as error:
        raise _refusal(name, revision, error) from None
    return Plan(
        name=name,
        commit=commit,
        sizes={file.rfilename: file.size for file in _needed(info, needed)},
        missing={file.filename: file.file_size or 0 for file in files if file.will_download},
        weights=weights,
        licence=_licence(info),
        parameters=info.safetensors.total if info.safetensors else None,
    )


def _weights_on_hub(api: HfApi, name: str, info: ModelInfo, *, pickles: bool) -> list[str]:
    """The weight files of a repository at a commit.

    Raises:
        StartupError: there are none that are read here.
    """
    listing = Listing(name, REPOSITORY, name, [file.rfilename for file in info.siblings or []])

    def index(file: str) -> Any:
        return read_index(Path(hf_hub_download(name, file, revision=str(info.sha), token=api.token)))

    convert = f"`vecmill pull {name} --convert-pickle` converts them once"
    if listing.pickled and pickles:
        return listing.pickles(lambda: index(PICKLE_INDEX))
    if not listing.readable and (offers := _other_revisions(api, name)):
        raise listing.refusal("; ".join(offers if not listing.pickled else [*offers, convert]))
    if listing.pickled:
        raise listing.refusal(f"no branch and no pull request has it; {convert}")
    return listing.chosen(lambda: index(INDEX))


def _heads_on_hub(api: HfApi, name: str, info: ModelInfo, present: Collection[str], *, pickles: bool) -> list[str]:
    """The weights of its modules, as far as it has them; that one is missing is said when the folder is read."""
    if MODULES not in present or not any(path.endswith((f"/{SINGLE}", f"/{PICKLE}")) for path in present):
        return []
    modules = Path(hf_hub_download(name, MODULES, revision=str(info.sha), token=api.token))
    files = []
    for file in _head_files(modules):
        pickle = f"{file.removesuffix(SINGLE)}{PICKLE}"
        files.append(pickle if pickles and file not in present else file)
    return [file for file in files if file in present]


def _other_revisions(api: HfApi, name: str) -> list[str]:
    """Which branches and pull requests have safetensors, in words; the hub's own conversions first."""
    try:
        refs = api.list_repo_refs(name, include_pull_requests=True)
        discussions = api.get_repo_discussions(name, discussion_type="pull_request")
        authors = {f"refs/pr/{each.num}": each.author for each in islice(discussions, MOST_REQUESTS)}
        branches = [each.name for each in refs.branches]
        requests = [each.ref for each in reversed(refs.pull_requests or [])]
        candidates = [*branches, *sorted(requests, key=lambda ref: authors.get(ref) != CONVERTER)][:MOST_TRIED]
        good = [ref for ref in candidates if _is_readable(api, name, ref)][:MOST_OFFERED]
    except HUB_ERRORS as error:
        logger.debug("hub: %s", error)
        return []
    return [_offer(name, ref, authors.get(ref)) for ref in good]


def _is_readable(api: HfApi, name: str, revision: str) -> bool:
    info = api.model_info(name, revision=revision, timeout=INFO_TIMEOUT)
    return Listing(name, REPOSITORY, name, [file.rfilename for file in info.siblings or []]).readable


def _offer(name: str, ref: str, author: str | None) -> str:
    command = f"`vecmill pull {name} --revision {ref}`"
    if not ref.startswith("refs/pr/"):
        return f"{command} has it"
    page = f"{constants.ENDPOINT}/{name}/discussions/{ref.rpartition('/')[2]}"
    whose = "the hub's converter" if author == CONVERTER else "anybody may open one, so compare before you trust it"
    return f"{command} has it, in a pull request of {author or 'somebody'} ({whose}; {page})"


def _needed(info: ModelInfo, patterns: list[str]) -> list[Any]:
    return list(
        filter_repo_objects(
            info.siblings or [],
            allow_patterns=patterns,
            ignore_patterns=DUPLICATES,
            key=lambda file: file.rfilename,
        )
    )


def _licence(info: ModelInfo) -> str:
    card: Any = info.card_data or {}
    named = [card.get("license"), card.get("license_name")]
    if not any(named):
        named = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    words = [word for name in named if name for word in (name if isinstance(name, list) else [name])]
    return ", ".join(map(str, words)) or "not stated"


def require_space(plan: Plan, *, beside: int = 0) -> None:
    """Refuse a download that would fill the disk, `beside` bytes included that are written besides.

    Raises:
        StartupError: the cache's disk has less room than the missing files take.
    """
    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.missing_size + beside:
        raise StartupError(
            f"{plan.name}: {decimal(plan.missing_size + beside)} are missing and {decimal(free)} are free in {cache}: "
            f"make room or set HF_HOME to a folder on a larger disk."
        )


def fetch(plan: Plan, *, hf_token: str | None, revision: str | None, report: Report) -> Path:
    """Fetch what is missing and check all files' sizes; the folder.

    A connection that breaks is taken up where it broke. After a failure, files that were complete are kept.

    Raises:
        StartupError: the hub or the disk failed, or a file has the wrong size; the sentence says what would help.
    """
    try:
        needed = [*_beside_weights(has_tokenizer=TOKENIZER in plan.sizes), *plan.weights]
        folder = _fetched(plan.name, revision, hf_token, needed, report)
    except HUB_ERRORS as error:
        raise _refusal(plan.name, revision, error) from None
    if folder.name != plan.commit:
        raise StartupError(
            f"{plan.name}: the revision moved from {plan.commit} to {folder.name} while it was pulled: run the same "
            f"command again."
        )
    _verify(plan, folder)
    return folder


def _verify(plan: Plan, folder: Path) -> None:
    wrong = []
    for path, size in plan.sizes.items():
        file = folder / path
        present = file.stat().st_size if file.exists() else None
        if present is None or (size is not None and present != size):
            file.resolve().unlink(missing_ok=True)  # the file in the cache's blobs; the folder holds a link to it
            file.unlink(missing_ok=True)
            wrong.append(f"{path} ({'missing' if present is None else f'{present:,} of {size:,} bytes'})")
    if wrong:
        raise StartupError(
            f"{plan.name}: not the size that the hub says, so removed: {', '.join(wrong)}: run the same command again "
            f"to fetch them."
        )


def _counting_bar(report: Report) -> type[tqdm]:
    """A bar for the library's downloads that draws nothing and tells `report` what it was told."""
    lock = threading.Lock()
    counted = {"bytes": 0, "files": 0}

    class CountingBar(tqdm):
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._what = "bytes" if kwargs.get("unit") == "B" else "files"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                # Two bars count bytes, one as received and one as written; with xet the former may stay behind.
                if self._what == "files" or self.n > counted["bytes"]:
                    counted[self._what] = int(self.n)
                report(counted["bytes"], counted["files"])

    return CountingBar


def _refusal(name: str, revision: str | None, error: Exception) -> StartupError:
    """The sentence for what the hub's library raised."""
    if isinstance(error, DryRunError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    logger.debug("hub: %s", error)
    page = f"{constants.ENDPOINT}/{name}"
    known: list[tuple[type[Exception], str]] = [
        (
            GatedRepoError,
            f"the model is gated: accept its terms at {page} and set HF_TOKEN to a token of that account.",
        ),
        (RepositoryNotFoundError, "the hub has no such model, or it is private: check the name or set HF_TOKEN."),
        (
            RevisionNotFoundError,
            f"the hub has no revision {revision or 'main'}: see {page} for its branches, tags and commits.",
        ),
        (HFValidationError, "not a hub id, which would be `owner/name`."),
    ]
    for kind, sentence in known:
        if isinstance(error, kind):
            return StartupError(f"{name}: {sentence}")
    if isinstance(error, HfHubHTTPError):
        return StartupError(f"{name}: {_status_sentence(error.response.status_code)}")
    if isinstance(error, OSError) and error.errno is not None:  # the library's own have no number
        return StartupError(
            f"{name}: {error.filename or constants.HF_HUB_CACHE} cannot be written ({error.strerror}): make room, "
            f"give write access, or set HF_HOME."
        )
    return StartupError(
        f"{name}: the connection to {constants.ENDPOINT} failed or broke ({type(error).__name__}): check the network, "
        f"then run the same command again; complete files are kept."
    )


def _status_sentence(status: int) -> str:
    if status in (401, 403):
        return f"the hub refuses the token ({status}): set HF_TOKEN to one that is valid and may read this model."
    return f"the hub answered {status}: try again later; complete files are kept."
