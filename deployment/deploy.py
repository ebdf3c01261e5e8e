"""`deploy.py`: what is missing is made, what differs is changed, the rest is left alone."""

from __future__ import annotations

import os
import pwd
from time import monotonic

from deployment import console, install
from deployment.console import ask
from deployment.layout import ACCOUNT, EMBED, VLLM, Layout, Options
from deployment.machine import Docker, Systemd, Tailscale
from deployment.preflight import Situation, problems, remarks
from deployment.services import Embed, Vllm, serve_in_tailnet
from deployment.steps import Step, carry_out, show


def run(options: Options, layout: Layout) -> int:
    """Look, plan, then print the plan or carry it out. The exit code: 0, 1, or 130 where interrupted."""
    started = monotonic()
    console.say("Looking at this machine")
    release = install.Release.of_clone(layout, options.python)
    situation = _look(options, layout, release)
    console.detail(remarks(situation))
    if wrong := problems(situation):
        console.complain(
            f"{'One thing' if len(wrong) == 1 else f'{len(wrong)} things'} to mend first; nothing was changed:"
        )
        for sentence in wrong:
            console.complain(f"  - {sentence}")
        if not options.dry_run:
            return 1
    steps = _plan(situation, release)
    if options.dry_run:
        show(steps)
        return 1 if wrong else 0
    if (code := carry_out(steps)) != 0:
        return code
    changed = any(step.actions for step in steps)
    took = console.duration(monotonic() - started)
    console.say(f"Done in {took}." if changed else "Nothing had to be changed.")
    _tell_next_steps(situation)
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
    """The address of vLLM on this machine, if it is deployed or will be."""
    beside = vllm or Vllm(layout, systemd, Docker(None, "", False, None), options)
    return beside.url if vllm is not None or beside.unit.ours else None


def account_name() -> str:
    """The name of the account that runs this."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _plan(situation: Situation, release: install.Release) -> list[Step]:
    """The steps in order: what takes long and may fail comes before anything that runs is touched."""
    layout, options, embed, vllm = situation.layout, situation.options, situation.embed, situation.vllm
    steps = []
    if embed is not None:
        steps += [_account(embed, situation), install.build(release, layout, options.python)]
    if vllm is not None:
        steps.append(vllm.pull())
    if embed is not None:
        steps.append(embed.start(release))
    if vllm is not None:
        steps.append(vllm.start())
    tailscale = situation.tailscale or Tailscale(False, {}, {})
    if embed is not None:
        steps.append(serve_in_tailnet(EMBED, embed.port, embed.reached_at, tailscale, layout, options))
    if vllm is not None:
        steps.append(serve_in_tailnet(VLLM, vllm.port, "127.0.0.1", tailscale, layout, options))
    return steps


def _account(embed: Embed, situation: Situation) -> Step:
    if situation.layout.user:
        lingers = (situation.layout.root / "var/lib/systemd/linger" / situation.user).exists()
        return embed.linger(lingers, situation.user)
    return embed.account(ask("getent", "passwd", ACCOUNT).returncode == 0)


def _tell_next_steps(situation: Situation) -> None:
    """Print the addresses, a curl call, and the configuration of QMD and CodeCartographer."""
    console.say()
    names = {service: situation.tailscale.name(service) if situation.tailscale else None for service in (EMBED, VLLM)}
    if situation.embed is not None:
        _tell_embed(situation.embed, names[EMBED])
    if situation.vllm is not None:
        reached = f", in the tailnet https://{names[VLLM]}" if names[VLLM] else ""
        console.say(f"vLLM       {situation.vllm.settings['MODEL']} on {situation.vllm.url}{reached}")
    console.say(f"Later      {situation.layout.invocation('--status')} (--logs, --restart, --stop, --uninstall)")


def _tell_embed(embed: Embed, name: str | None) -> None:
    here = embed.url
    address = f"https://{name}" if name else here
    keys = embed.has_keys
    key = ' -H "Authorization: Bearer $VECMILL_API_KEY"' if keys else ""
    console.say(f"Here       {here} (dashboard {here}/)")
    if name:
        console.say(f"Tailnet    {address}")
    console.say("Try it")
    console.detail(
        [f"curl {address}/v1/embeddings{key} -H 'Content-Type: application/json' -d '{{\"input\": [\"hello world\"]}}'"]
    )
    console.say("QMD, in ~/.config/qmd/index.yml")
    console.detail(["remote:", f"  embed_url: {address}"])
    if embed.settings.get("GENERATION_URL"):
        console.detail([f"  generation_url: {address}"])
    else:
        console.detail(["  generation_url: http://...  # a server that generates text: without one QMD stays local"])
    console.detail([f"  api_key: {'${VECMILL_API_KEY}' if keys else 'none'}"])
    console.say("CodeCartographer")
    console.detail([f'set_project with provider: "dgx" and dgx_endpoint: "{address}/embed"'])
