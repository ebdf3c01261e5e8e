"""`deploy.py`: what is missing is made, what differs is changed, the rest is left alone."""

from __future__ import annotations

import os
import pwd
from time import monotonic

from deployment import console, install, next_steps, tailnet
from deployment.commands import ask
from deployment.embed import Embed
from deployment.layout import ACCOUNT, Layout
from deployment.machine import Systemd
from deployment.neighbours import Docker, Tailscale
from deployment.options import EMBED, VLLM, Options
from deployment.preflight import problems
from deployment.remarks import remarks
from deployment.situation import Situation
from deployment.steps import Step, carry_out, show
from deployment.vllm import Vllm


def run(options: Options, layout: Layout) -> int:
    """Look, plan, then print the plan or carry it out. The exit code: 0, 1, or 130 where interrupted."""
    started = monotonic()
    console.say("Looking at this machine")
    release = install.Release.of_clone(layout, options.python)
    found = _look(options, layout, release)
    console.detail(remarks(found))
    if wrong := problems(found):
        console.complain(
            f"{'One thing' if len(wrong) == 1 else f'{len(wrong)} things'} to mend first; nothing was changed:"
        )
        for sentence in wrong:
            console.complain(f"  - {sentence}")
        if not options.dry_run:
            return 1
    steps = _plan(found, release)
    if options.dry_run:
        show(steps)
        return 1 if wrong else 0
    if (code := carry_out(steps)) != 0:
        return code
    changed = any(step.actions for step in steps)
    took = console.duration(monotonic() - started)
    console.say(f"Done in {took}." if changed else "Nothing had to be changed.")
    next_steps.tell(found)
    return 0


def _look(options: Options, layout: Layout, release: install.Release) -> Situation:
    systemd = Systemd(layout)
    tailscale = Tailscale.look() if options.tailscale else None
    docker = Docker.look(VLLM) if VLLM in options.services else None
    vllm = Vllm(layout, systemd, docker, options) if docker is not None else None
    embed = None
    if EMBED in options.services:
        name = tailscale.name(EMBED) if tailscale else None
        embed = Embed(layout, systemd, options, name, _generation_url(layout, systemd, options, vllm))
    builds = embed is not None and not release.complete
    return Situation(options, layout, account_name(), tailscale, docker, embed, vllm, builds)


def _generation_url(layout: Layout, systemd: Systemd, options: Options, vllm: Vllm | None) -> str | None:
    """Where vLLM is, or will be, on this machine."""
    beside = vllm or Vllm(layout, systemd, Docker(None, "", False, None), options)
    return beside.url if vllm is not None or beside.unit.ours else None


def account_name() -> str:
    """Who runs this."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _plan(found: Situation, release: install.Release) -> list[Step]:
    """What takes long and may fail comes before anything that runs is touched."""
    layout, options, embed, vllm = found.layout, found.options, found.embed, found.vllm
    steps = []
    if embed is not None:
        steps += [_account(embed, found), install.build(release, layout, options.python)]
    if vllm is not None:
        steps.append(vllm.pull())
    if embed is not None:
        steps.append(embed.start(release))
    if vllm is not None:
        steps.append(vllm.start())
    tailscale = found.tailscale or Tailscale(False, {}, {})
    if embed is not None:
        steps.append(tailnet.serve(EMBED, embed.port, embed.reached_at, tailscale, layout, options))
    if vllm is not None:
        steps.append(tailnet.serve(VLLM, vllm.port, "127.0.0.1", tailscale, layout, options))
    return steps


def _account(embed: Embed, found: Situation) -> Step:
    if found.layout.user:
        lingers = (found.layout.root / "var/lib/systemd/linger" / found.user).exists()
        return embed.linger(lingers, found.user)
    return embed.account(ask("getent", "passwd", ACCOUNT).returncode == 0)
