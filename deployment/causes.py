"""What is usually behind an error message, in a sentence with the cure."""

from __future__ import annotations

import re

CAUSES = (
    (
        r"ensurepip is not available|No module named '?ensurepip",
        "Python lacks its module ensurepip: sudo apt install python3-venv",
    ),
    (r"No space left on device", "The disk is full: df -h shows which, then run this again."),
    (
        r"Temporary failure in name resolution|Could not resolve host|Network is unreachable|NewConnectionError"
        r"|no such host|i/o timeout|TLS handshake timeout",
        "This machine cannot reach the internet (or its DNS): mend that, then run this again.",
    ),
    (
        r"No matching distribution found|requires a different Python",
        "There is no build of a package for this Python: choose 3.12 with --python /usr/bin/python3.12",
    ),
    (
        r"permission denied while trying to connect to the [Dd]ocker|dial unix .*permission denied",
        "This account may not use Docker: sudo usermod -aG docker $USER, then log in again.",
    ),
    (r"Cannot connect to the Docker daemon", "Docker does not run: sudo systemctl start docker"),
    (
        r"unauthorized|denied: requested access|pull access denied",
        "The registry refuses the image: check the name given to --image, or docker login nvcr.io",
    ),
    (r"manifest unknown|manifest for .* not found", "There is no such image: choose another tag with --image"),
    (r"toomanyrequests", "The registry limits how often it is asked: try again in some minutes."),
    (
        r"could not select device driver|unknown or invalid runtime name: nvidia|nvidia-container-cli",
        "Docker has no NVIDIA runtime: sudo nvidia-ctk runtime configure --runtime=docker && "
        "sudo systemctl restart docker",
    ),
    (
        r"must be tagged nodes",
        "Tailscale lets only tagged machines host services: give this one a tag in the admin console (Machines, Edit "
        "ACL tags), and define the services svc:qmd-embed and svc:qmd-vllm there with the endpoint tcp:443.",
    ),
    (
        r"[Aa]ccess denied: serve config denied|[Uu]se 'sudo tailscale",
        "Tailscale takes this from root or its operator only: sudo tailscale set --operator=$USER",
    ),
    (r"Logged out|NeedsLogin|not logged in", "Tailscale is not logged in: sudo tailscale up"),
    (
        r"HTTPS.*(not enabled|disabled|must be enabled)|enable HTTPS",
        "The tailnet has no HTTPS certificates: enable them in the admin console under DNS.",
    ),
    (
        r"flag provided but not defined: -service",
        "This Tailscale is too old for services: sudo tailscale update",
    ),
    (
        r"Failed to connect to (user scope )?bus",
        "There is no systemd of this user: log in with ssh or at the console, not with su or sudo.",
    ),
    (r"is masked", "The unit is masked: systemctl unmask it, then run this again."),
    (
        r"cannot be bound|[Aa]ddress already in use|port is already allocated",
        "Something else uses the port: sudo ss -ltnp shows what; --port (--vllm-port) chooses another.",
    ),
    (
        r"Free memory on device|less than desired GPU memory utilization|No available memory for the cache",
        "vLLM finds too little free memory: lower GPU_MEMORY_UTILIZATION in vllm.env, or stop what else uses it.",
    ),
    (
        r"OutOfMemoryError|out of memory",
        "The memory does not hold the models: choose smaller ones, or lower what else runs (vLLM, Ollama).",
    ),
    (
        r"401 Client Error|GatedRepoError|Access to model .* is restricted",
        "The hub refuses the model: write HF_TOKEN=... of an account that may read it into the service's env file.",
    ),
    (r"no such option|No such option|No such command", "The unit and the installed version do not fit: deploy again."),
)


def likely_cause(output: str) -> str | None:
    """The sentence for the first message that is known."""
    return next((sentence for pattern, sentence in CAUSES if re.search(pattern, output)), None)
