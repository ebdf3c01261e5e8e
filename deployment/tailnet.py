"""Tailscale services: each is an HTTPS name in the tailnet for one port of this machine."""

from __future__ import annotations

from deployment.actions import Run
from deployment.layout import Layout
from deployment.neighbours import Tailscale
from deployment.options import Options
from deployment.steps import Step

REFUSAL = "must be tagged nodes"  # with exit code 0
WAITS = (
    "approval from an admin is required",
    "An admin has to approve this machine for the service once: https://login.tailscale.com/admin/services",
)


def serve(service: str, port: int, host: str, tailscale: Tailscale, layout: Layout, options: Options) -> Step:
    """Give the service its name."""
    target = f"{host}:{port}"
    name = tailscale.name(service) or f"{service}.<tailnet>.ts.net"
    title = f"Serve https://{name}"
    undo = " ".join(off(service).argv)
    if not options.tailscale:
        return Step(title, (), undo, done="left out (--no-tailscale)")
    if tailscale.target(service) in (f"http://{target}", target):
        return Step(title, (), undo, done="already so")
    argv = ("tailscale", "serve", f"--service=svc:{service}", "--https=443", target)
    return Step(title, (Run(argv, refusal=REFUSAL, remarks=(WAITS,)),), undo if layout.user else f"sudo {undo}")


def off(service: str) -> Run:
    """Take the name away."""
    return Run(("tailscale", "serve", "clear", f"svc:{service}"))
