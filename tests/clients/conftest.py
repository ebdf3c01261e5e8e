"""`make test` leaves these out: their packages are in environments of their own.

`make test-clients` and `make fuzz` name them.
"""

from __future__ import annotations

collect_ignore = ["test_environments.py", "test_fuzz.py", "environments"]
