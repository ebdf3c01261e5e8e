"""What one should know and what keeps nothing from going on."""

from __future__ import annotations

from collections.abc import Iterator

from deployment import files, machine
from deployment.embed import loopback
from deployment.situation import VENV_BYTES, Situation

MODEL_BYTES = 25_000_000_000
IMAGE_BYTES = 25_000_000_000


def remarks(found: Situation) -> list[str]:
    """Sentences that one should know and that keep nothing from going on."""
    checks = (_gpu, _compiler, _reach, _names, _space, _takeover)
    return [sentence for check in checks for sentence in check(found)]


def _gpu(found: Situation) -> Iterator[str]:
    name = machine.gpu(found.layout)
    yield f"GPU: {name}" if name else "No NVIDIA GPU is seen: qmd-embed will run on the CPU, with the bundled model."


def _compiler(found: Situation) -> Iterator[str]:
    """With a GPU it is a problem (`preflight`)."""
    if found.embed is None or not found.embed.compiles or found.embed.on_gpu:
        return
    if missing := machine.missing_to_compile(found.options.python, on_gpu=False):
        packages = " ".join(missing)
        yield f"torch.compile cannot be used without a compiler and Python's headers: sudo apt install {packages}"


def _reach(found: Situation) -> Iterator[str]:
    embed = found.embed
    if embed is None:
        return
    if not loopback(embed.host) and not embed.has_keys:
        yield f"HOST={embed.host} without keys: everyone who reaches it may use it. --api-key-file gives it keys."
    given = found.options.api_key_file
    if given is not None and files.text(given) is not None and files.mode(given) & 0o077:
        yield f"{given} can be read by other accounts: chmod 600 {given}"


def _names(found: Situation) -> Iterator[str]:
    name = found.tailscale and found.tailscale.name("qmd-embed")
    allowed = found.embed.settings.get("ALLOWED_HOSTS") if found.embed else None
    if name and allowed and name not in allowed.split(",") and "*" not in allowed:
        yield f"ALLOWED_HOSTS lacks {name}: add it to {found.layout.embed_env}, or that address is refused."
    if found.tailscale is not None and found.tailscale.running and not found.tailscale.https:
        yield "The tailnet gives no HTTPS certificates: enable them in the admin console under DNS."


def _space(found: Situation) -> Iterator[str]:
    free = files.bytes_free(found.layout.real(found.layout.hub_cache))
    wanted = VENV_BYTES * found.builds + MODEL_BYTES + IMAGE_BYTES * (found.vllm is not None)
    if free < wanted:
        yield f"{free / 1e9:.0f} GB are free; code, models and image may take {wanted / 1e9:.0f}."


def _takeover(found: Situation) -> Iterator[str]:
    if found.embed is not None and found.embed.unit.foreign:
        yield f"{found.embed.unit.path} is of an earlier guide: it is replaced, and kept beside as *.before-vecmill."
    if found.vllm is not None and found.vllm.replaces_container:
        yield "The container qmd-vllm was started by hand: it is replaced by a service, which uses its models."
