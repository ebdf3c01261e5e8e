"""How long Kubernetes takes from a rush of requests to one replica more that is ready: a simulation, with a seed.

Nothing is measured. Each step of docker/k8s/overlays/replicas-keda is drawn from what its own documentation says of
it, with the defaults of Kubernetes, KEDA and this repository's manifests; what depends on the cluster is assumed below.

1. The tokens that wait pass the threshold. Prometheus sees it with its next scrape: every 15 s.
2. The autoscaler asks KEDA, which asks Prometheus, with its next sync: every 15 s.
3. It acts once all that it has seen within `stabilizationWindowSeconds` asks for more. Until a window of high values is
   full, the lowest one in it decides.
4. A pod is made, scheduled to a node with a free GPU, and its volumes are attached.
5. The node pulls the image, where it has not got it.
6. The server starts, downloads its models, where its volume has not got them, loads them and warms up.
7. Kubernetes sees that it is ready with its next probe, every 5 s, and tells the nodes.

    python -m benchmarks.cluster.reaction_time
    python -m benchmarks.cluster.reaction_time --json
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table

SEED, DRAWS = 20, 10_000


@dataclass(frozen=True)
class Assumptions:
    """Seconds, but for sizes and speeds. A pair is a range that is drawn from evenly."""

    scrape_every: float = 15.0
    """ServiceMonitor's interval."""
    sync_every: float = 15.0
    """--horizontal-pod-autoscaler-sync-period of kube-controller-manager."""
    query: tuple[float, float] = (0.1, 1.0)
    """KEDA's question to Prometheus, and its answer."""
    window: float = 120.0
    """stabilizationWindowSeconds of scaling up."""
    schedule: tuple[float, float] = (0.5, 3.0)
    volumes: tuple[float, float] = (2.0, 15.0)
    """Attaching and mounting what a new pod claims; a volume that must first be made takes longer."""
    image_gb: float = 0.0
    """To be pulled, compressed; 0: the node has it."""
    unpack: float = 8.0
    """Seconds for each of these gigabytes."""
    start: tuple[float, float] = (10.0, 25.0)
    """Container, Python, torch, CUDA."""
    models_gb: float = 0.0
    """To be downloaded; 0: the volume has them."""
    network_gbit: float = 1.0
    load: tuple[float, float] = (10.0, 40.0)
    """Two models of 4B parameters in bfloat16, 16 GB, from a disk of 0.4 to 1.6 GB/s."""
    warm_up: tuple[float, float] = (20.0, 60.0)
    """Every size of forward pass, with torch.compile and CUDA graphs."""
    probe_every: float = 5.0
    """The readiness probe's period."""
    endpoints: tuple[float, float] = (0.2, 2.0)
    """Until the nodes know the pod."""


@dataclass(frozen=True)
class Reaction:
    """One reaction, in seconds."""

    seen: float
    """From the rush to a sync that has seen it."""
    decided: float
    """From there until the autoscaler asks for a pod more."""
    placed: float
    """From there until the container can start, its image pulled."""
    loaded: float
    """From there until the server says that it is ready."""
    reached: float
    """From there until requests come."""

    @property
    def total(self) -> float:
        """From the rush until requests come."""
        return self.seen + self.decided + self.placed + self.loaded + self.reached


def simulate(assumed: Assumptions, draw: random.Random) -> Reaction:
    """One reaction."""
    scraped = draw.uniform(0, assumed.scrape_every)
    phase = draw.uniform(0, assumed.sync_every)  # of the autoscaler's clock, when the rush begins
    first = _next_tick(scraped, phase, assumed.sync_every)
    decided = _decided(first, assumed)
    image = assumed.image_gb * (8 / assumed.network_gbit + assumed.unpack)
    models = assumed.models_gb * 8 / assumed.network_gbit
    return Reaction(
        seen=first,
        decided=decided - first + draw.uniform(*assumed.query),
        placed=draw.uniform(*assumed.schedule) + draw.uniform(*assumed.volumes) + image,
        loaded=draw.uniform(*assumed.start) + models + draw.uniform(*assumed.load) + draw.uniform(*assumed.warm_up),
        reached=draw.uniform(0, assumed.probe_every) + draw.uniform(*assumed.endpoints),
    )


def _next_tick(at: float, phase: float, every: float) -> float:
    """The first time of a clock that is not before `at`; it ticks at `phase`, and `every` so many seconds."""
    return phase + max(0, ceil((at - phase) / every)) * every


def _decided(first: float, assumed: Assumptions) -> float:
    """The first sync at which no value is left in the window that was seen before the rush.

    The last one that asked for no more is of the sync before `first`. One that is exactly as old as the window counts:
    clocks are not that exact, and it makes the figure longer.

    Source: https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#stabilization-window
    """
    last_low = first - assumed.sync_every
    syncs = 0
    while assumed.window and first + syncs * assumed.sync_every - last_low <= assumed.window:
        syncs += 1
    return first + syncs * assumed.sync_every


CASES: dict[str, Assumptions] = {
    "image and models there": Assumptions(),
    "the same, no window": Assumptions(window=0),
    "models to be downloaded": Assumptions(models_gb=16),
    "image and models to be fetched": Assumptions(models_gb=16, image_gb=5),
    "the same, 10 Gbit/s": Assumptions(models_gb=16, image_gb=5, network_gbit=10),
}
PARTS = tuple(field.name for field in fields(Reaction))


def table(draws: int = DRAWS, seed: int = SEED) -> dict[str, dict[str, float]]:
    """Of each case the medians of its parts, and median, p95 and longest of all of it; in whole seconds."""
    found = {}
    for name, assumed in CASES.items():
        draw = random.Random(seed)
        reactions = [simulate(assumed, draw) for _ in range(draws)]
        totals = [each.total for each in reactions]
        parts = {part: _at([getattr(each, part) for each in reactions], 0.5) for part in PARTS}
        found[name] = {**parts, "p50": _at(totals, 0.5), "p95": _at(totals, 0.95), "longest": round(max(totals))}
    return found


def _at(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[int(share * (len(values) - 1))])


def markdown() -> list[str]:
    """The rows of the table in docs/kubernetes.md."""
    return [
        f"| {name} | " + " | ".join(f"{value:.0f}" for value in row.values()) + " |" for name, row in table().items()
    ]


def shortest_and_longest(assumed: Assumptions) -> tuple[float, float]:
    """The bounds that no draw can pass."""
    low, high = (Assumptions(**_ends(assumed, end)) for end in (0, 1))
    return _bound(low, phases=0), _bound(high, phases=1)


def _ends(assumed: Assumptions, end: int) -> dict[str, Any]:
    """All of it, with one end of each range for the whole."""
    return {name: (value[end],) * 2 if isinstance(value, tuple) else value for name, value in asdict(assumed).items()}


def _bound(assumed: Assumptions, phases: int) -> float:
    fixed = simulate(assumed, random.Random(SEED))
    first = phases * (assumed.scrape_every + assumed.sync_every)
    probe = phases * assumed.probe_every + assumed.endpoints[0]
    return first + fixed.decided + fixed.placed + fixed.loaded + probe


def main() -> int:
    """Simulate and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = table()
    if options.json:
        print(json.dumps({"seed": SEED, "draws": DRAWS, "cases": found}))
        return 0
    shown = Table("case", *PARTS, "p50", "p95", "longest", title=f"seconds; {DRAWS} draws, seed {SEED}")
    for name, row in found.items():
        shown.add_row(name, *(f"{value:.0f}" for value in row.values()))
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
