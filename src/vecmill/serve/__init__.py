"""The process of the server: its socket, its log, its signals, its end, and what systemd is told."""

from vecmill.serve.process import run_server

__all__ = ["run_server"]
