"""The API's document as it is stored, which takes a second less than to make it.

`tests/http/test_openapi.py` holds it equal to the server's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

STORED = Path(__file__).parents[1] / "docs" / "openapi.json"
DOCUMENT: dict[str, Any] = orjson.loads(STORED.read_bytes())
