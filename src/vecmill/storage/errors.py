"""What storage says when it cannot do what it was asked, whichever it is."""

from __future__ import annotations


class StoreFailed(Exception):
    """It cannot be used now; nothing has changed. The message is for the log."""
