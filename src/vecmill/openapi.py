"""`docs/openapi.json`, written from the routes: `python -m vecmill.openapi > docs/openapi.json`."""

from __future__ import annotations

import json
import sys

from vecmill.app import create_app
from vecmill.config import load_settings


def document_text() -> str:
    """The text of `docs/openapi.json`: the same for the same routes, whatever their order in the code."""
    return json.dumps(create_app(load_settings()).openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document_text())
