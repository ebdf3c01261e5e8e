"""Where the services are, and what to do with them."""

from __future__ import annotations

from deployment import console
from deployment.options import EMBED, VLLM
from deployment.situation import Situation


def tell(found: Situation) -> None:
    """Addresses, then a call, QMD's configuration and CodeCartographer's line."""
    console.say()
    names = {service: found.tailscale.name(service) if found.tailscale else None for service in (EMBED, VLLM)}
    if found.embed is not None:
        _tell_embed(found, names[EMBED])
    if found.vllm is not None:
        reached = f", in the tailnet https://{names[VLLM]}" if names[VLLM] else ""
        console.say(f"vLLM       {found.vllm.settings['MODEL']} on {found.vllm.url}{reached}")
    console.say(f"Later      {found.layout.invocation('--status')} (--logs, --restart, --stop, --uninstall)")


def _tell_embed(found: Situation, name: str | None) -> None:
    if found.embed is None:
        return
    here = found.embed.url
    address = f"https://{name}" if name else here
    keys = found.embed.has_keys
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
    if found.embed.settings.get("GENERATION_URL"):
        console.detail([f"  generation_url: {address}"])
    else:
        console.detail(["  generation_url: http://...  # a server that generates text: without one QMD stays local"])
    console.detail([f"  api_key: {'${VECMILL_API_KEY}' if keys else 'none'}"])
    console.say("CodeCartographer")
    console.detail([f'set_project with provider: "dgx" and dgx_endpoint: "{address}/embed"'])
