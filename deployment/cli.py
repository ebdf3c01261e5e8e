"""The command line."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deployment import console, control, deploy, files
from deployment.layout import IMAGE, MODEL, PORT, SERVICES, VLLM, VLLM_PORT, WAIT_S, Layout, Options

ACTIONS = {
    "status": "what runs, since when, on what; exit code 0 only when all of it is ready",
    "logs": "follow the services' log",
    "restart": "restart, and wait until ready",
    "stop": "stop",
    "uninstall": "remove services, code and configuration; state and models stay (--purge)",
}
FOR_DEPLOYING = ("host", "port", "api_key_file", "model", "rerank_model", "image", "vllm_port", "python")


def main(argv: Sequence[str]) -> int:
    """Run the chosen action. The exit code: 0, 1 if it failed, 2 for wrong options, 130 if interrupted."""
    options = parse(argv)
    layout = Layout.of(options.user)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # files and programs may say what no terminal can show
    os.umask(0o022)  # the service's account reads what root writes; secrets get their rights one by one
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    actions = {
        "deploy": deploy.run,
        "uninstall": control.uninstall,
        "status": control.status,
        "logs": control.logs,
        "restart": control.restart,
        "stop": control.stop,
    }
    files.strict = os.geteuid() == 0 and not layout.staged
    try:
        if not _locks(options, layout):
            return actions[options.action](options, layout)
        with files.only_one(layout.lock) as alone:
            if not alone:
                console.complain("Another deploy.py is at work on this machine: wait until it has ended.")
                return 1
            return actions[options.action](options, layout)
    except OSError as error:
        console.complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        return 1
    except KeyboardInterrupt:
        console.complain("Interrupted; nothing was changed by what was interrupted.")
        return 130


def _locks(options: Options, layout: Layout) -> bool:
    """Whether this run must be the only one: it changes this machine. Who may not is told so further on."""
    changes = not options.dry_run and options.action not in ("status", "logs")
    may = bool(os.environ.get("XDG_RUNTIME_DIR")) if layout.user else os.geteuid() == 0
    return changes and not layout.staged and may


def parse(argv: Sequence[str]) -> Options:
    """The options that the arguments give; exits with 2 and a message if they are wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    action = next((name for name in ACTIONS if getattr(given, name)), "deploy")
    for problem in _contradictions(given, action):
        parser.error(problem)
    chosen = [SERVICES[given.service]] if given.service else list(SERVICES.values())
    if given.no_vllm and VLLM in chosen:
        chosen.remove(VLLM)
    for_embed = given.service == "embed"
    return Options(
        services=tuple(chosen),
        named=given.service is not None,
        action=action,
        dry_run=given.dry_run,
        user=given.user,
        tailscale=not given.no_tailscale,
        host=given.host,
        port=None if given.service == "vllm" else given.port,
        api_key_file=given.api_key_file,
        embed_model=given.model if for_embed else None,
        rerank_model=given.rerank_model,
        vllm_model=None if for_embed else given.model,
        image=given.image,
        vllm_port=given.port if given.service == "vllm" else given.vllm_port,
        purge=given.purge,
        lines=given.lines or 100,
        wait=given.wait,
        python=_program(given.python or sys.executable),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy.py",
        description="Deploys vecmill as the service qmd-embed, and vLLM beside it as qmd-vllm.",
        epilog="Without an action: deploy, or bring up to date what is deployed. Running it twice changes nothing.",
    )
    parser.add_argument("service", nargs="?", choices=SERVICES, help="only this service; default: both")
    action = parser.add_mutually_exclusive_group()
    for name, help_text in ACTIONS.items():
        action.add_argument(f"--{name}", action="store_true", help=help_text)
    parser.add_argument("--dry-run", action="store_true", help="print every command and every file, do nothing")
    parser.add_argument("--user", action="store_true", help="as services of this user, without root")
    parser.add_argument("--no-tailscale", action="store_true", help="leave Tailscale alone")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM alone")
    parser.add_argument("--host", type=_word, help="address that qmd-embed binds; default: 127.0.0.1")
    parser.add_argument("--port", type=_port, help=f"port of qmd-embed ({PORT}), or of vllm where that is named")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that clients must send, one a line: `name:key` or `key`"
    )
    parser.add_argument(
        "--model", type=_word, help=f"vLLM's model ({MODEL}); after `embed` the embedding model (EMBED_MODEL)"
    )
    parser.add_argument("--rerank-model", type=_word, help="the reranker (RERANK_MODEL)")
    parser.add_argument("--image", type=_word, help=f"vLLM's container image ({IMAGE})")
    parser.add_argument("--vllm-port", type=_port, metavar="PORT", help=f"port of vLLM on this machine ({VLLM_PORT})")
    parser.add_argument("--purge", action="store_true", help="with --uninstall: state, models and account too")
    parser.add_argument("-n", "--lines", type=_count, metavar="N", help="with --logs: lines to begin with (100)")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help=f"how long to wait for ready ({WAIT_S:.0f}); 0: not",
    )
    parser.add_argument("--python", metavar="PROGRAM", help="Python of the virtual environment; default: this one")
    return parser


def _contradictions(given: argparse.Namespace, action: str) -> list[str]:
    beside = [f"--{name.replace('_', '-')}" for name in FOR_DEPLOYING if getattr(given, name) is not None]
    foreign = ("host", "api_key_file", "rerank_model") if given.service == "vllm" else ("image", "vllm_port")
    wrong = [f"--{name.replace('_', '-')}" for name in foreign if getattr(given, name) is not None]
    checks = [
        (action != "deploy" and beside, f"{' and '.join(beside)} cannot be used with --{action}"),
        (given.service == "vllm" and given.no_vllm, "vllm and --no-vllm contradict each other"),
        (given.service and wrong, f"{' and '.join(wrong)} does not concern {given.service}"),
        (given.no_vllm and given.model and not given.service, "--model is vLLM's: say `embed --model`"),
        (given.purge and action != "uninstall", "--purge belongs to --uninstall"),
        (given.lines is not None and action != "logs", "-n belongs to --logs"),
        (given.dry_run and action in ("status", "logs"), f"--{action} changes nothing: there is nothing to try dry"),
    ]
    if given.service == "embed" and not given.user:
        checks += [
            (_at_home(model), f"{model}: the service cannot see home folders; put the model elsewhere, such as /srv")
            for model in (given.model, given.rerank_model)
        ]
    return [sentence for wrong, sentence in checks if wrong]


def _program(named: str) -> str:
    """A path from here as one from anywhere; a name without a slash is looked up in PATH."""
    return os.path.abspath(named) if "/" in named else named


def _at_home(model: str | None) -> bool:
    return model is not None and model.startswith((".", "~", "/home/", "/root/"))


def _word(value: str) -> str:
    """A value that needs no quotes in an env file."""
    if not re.fullmatch(r"[\w./:@,+~\[\]-]+", value, re.ASCII):
        raise argparse.ArgumentTypeError(f"{value!r}: letters, digits and ./:@,+~[]- only")
    return value


def _port(value: str) -> int:
    if not value.isdecimal() or not 1024 <= int(value) <= 65535:
        raise argparse.ArgumentTypeError(f"{value!r}: a number from 1024 to 65535; below, the service has no right to")
    return int(value)


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r}: a number from 1 on")
    return int(value)
