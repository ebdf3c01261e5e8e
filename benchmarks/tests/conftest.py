"""Like all tests, those of the benchmarks run without the settings of the person who runs them."""

from tests.conftest import hermetic, server

__all__ = ["hermetic", "server"]
