"""The benchmarks are tested as everything is: without the settings of whoever runs the tests."""

from tests.conftest import hermetic, server

__all__ = ["hermetic", "server"]
