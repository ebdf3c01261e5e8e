"""Ray is imported here first: it warns of how it uses pydantic, and a warning is an error in every test."""

from __future__ import annotations

import warnings
from contextlib import suppress

with suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vecmill.cluster.application  # noqa: F401
