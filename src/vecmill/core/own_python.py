"""This interpreter, for processes of our own."""

from __future__ import annotations

import sys

# -P: `-m` would import what lies in the working folder, which may be a model's, before the standard library.
OWN_PYTHON = (sys.executable, "-P")
