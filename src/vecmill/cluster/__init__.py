"""Several servers behind one address, by Ray Serve. The only room that knows Ray.

    serve run vecmill.cluster:app                         # the settings of the environment and `.env`
    serve run vecmill.cluster:build replicas=2            # with arguments, see `vecmill.cluster.application.Cluster`
    serve deploy docker/ray/one-machine.yaml

Each replica is a whole server with its own device: the application that `vecmill serve` runs. In front of them stands
`Front`, which only looks at a request, finds the models it is for and passes it on; `WaitRouter` chooses the replica by
`core.routing`. Knows how servers are placed, found, watched and scaled; knows nothing of what a request means.

Needs the extra `ray`: pip install 'vecmill[ray]'.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["app", "build"]


def __getattr__(name: str) -> Any:
    """`app` and `build`, made when they are asked for: `serve` imports them by these names."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    build = import_module("vecmill.cluster.application").build
    return build if name == "build" else build({})
