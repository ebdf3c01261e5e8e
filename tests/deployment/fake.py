"""Stands in for every program that deploy.py calls, each under its own name.

Knows the standard library only. FAKE names a folder: `calls` gets a line for each call, `state.json` is what the
programs remember, and what is to go wrong. A unit that is started is a process that answers HTTP. It is started dozens
of times in a test, so it imports little.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FOLDER = os.environ["FAKE"]
ROOT = os.environ.get("DESTDIR", "/")
STATE = f"{FOLDER}/state.json"
LAUNCHER = f"{FOLDER}/launcher"
CONFIGS = ("etc/vecmill", "home/ann/.config/vecmill")


def main(name: str, argv: list[str]) -> int:
    with open(f"{FOLDER}/calls", "a") as calls:
        calls.write(json.dumps([sys.argv[0] if name in ("python", "vecmill") else name, *argv]) + "\n")
    with open(STATE) as remembered:
        state = json.load(remembered)
    line = " ".join([name, *argv])
    for failure in state["failures"]:
        if failure["at"] in line:
            if failure.get("hangs"):
                os.mknod(f"{FOLDER}/hanging")
                signal.pause()
            sys.stdout.write(failure.get("stdout", ""))
            sys.stderr.write(failure.get("stderr", ""))
            return int(failure["code"])
    code = int(PROGRAMS[name](argv, state) or 0)
    with open(f"{STATE}.new", "w") as remembered:
        json.dump(state, remembered)
    os.replace(f"{STATE}.new", STATE)
    return code


def systemctl(argv: list[str], state: dict[str, Any]) -> None:
    words = [word for word in argv if word not in ("--user", "--now", "--no-block")]
    if words[0] == "daemon-reload":
        return
    name = words[-1]
    unit = state["units"].setdefault(name, {"ActiveState": "inactive", "SubState": "dead", "LoadState": "not-found"})
    if words[0] == "show":
        sys.stdout.write("".join(f"{key}={value}\n" for key, value in unit.items() if not key.startswith("_")))
    elif words[0] == "enable":
        unit.update(UnitFileState="enabled", LoadState="loaded")
    elif words[0] == "restart":
        stop(unit)
        start(name, unit, state)
    elif words[0] in ("stop", "disable"):
        stop(unit)
        if words[0] == "disable":
            unit.update(UnitFileState="disabled", LoadState="not-found")
    elif words[0] == "reset-failed":
        unit.update(ActiveState="inactive", SubState="dead")


def start(name: str, unit: dict[str, Any], state: dict[str, Any]) -> None:
    state["started"] += 1
    unit.update(LoadState="loaded", InvocationID=str(state["started"]), NRestarts="0")
    if name in state["broken"]:
        unit.update(ActiveState="failed", SubState="failed", Result="exit-code")
        return
    unit.update(ActiveState="active", SubState="running", ActiveEnterTimestamp="Sat 2026-11-21 17:00:00 UTC")
    config, key = ("embed.env", "PORT=") if name.startswith("qmd-embed") else ("vllm.env", "HOST_PORT=")
    path = next(path for folder in CONFIGS if os.path.exists(path := f"{ROOT}/{folder}/{config}"))
    with open(path, errors="replace") as lines:
        port = next(line.removeprefix(key).strip() for line in lines if line.startswith(key))
    server = f"{FOLDER}/server"
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    unit["_pid"] = os.posix_spawn(server, [server, name, port, STATE], os.environ, file_actions=quiet, setsid=True)
    with open(f"{FOLDER}/pids", "a") as pids:
        pids.write(f"{unit['_pid']}\n")


def stop(unit: dict[str, Any]) -> None:
    unit.update(ActiveState="inactive", SubState="dead")
    if pid := unit.pop("_pid", None):
        os.kill(pid, signal.SIGKILL)
        while running(pid):
            time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def tailscale(argv: list[str], state: dict[str, Any]) -> None:
    if argv == ["status", "--json"]:
        json.dump(state["tailscale"], sys.stdout)
    elif argv == ["serve", "status", "--json"]:
        json.dump({"Services": state["served"]} if state["served"] else {}, sys.stdout)
    elif argv == ["debug", "prefs"]:
        json.dump({"OperatorUser": state["operator"]}, sys.stdout)
    elif argv[:2] == ["serve", "clear"]:
        state["served"].pop(argv[2])
    else:
        service = argv[1].partition("=")[2]
        name = f"{service.removeprefix('svc:')}.tail1234.ts.net:443"
        state["served"][service] = {"Web": {name: {"Handlers": {"/": {"Proxy": f"http://{argv[-1]}"}}}}}
        sys.stdout.write(f"This machine is configured for {service}, but approval from an admin is required.\n")


def docker(argv: list[str], state: dict[str, Any]) -> int:
    answer: object = None
    if argv[0] == "info":
        answer = {"Runtimes": {"runc": {}, "nvidia": {}}}
    elif argv[:2] == ["image", "inspect"]:
        return 0 if argv[2] in state["images"] else 1
    elif argv[:2] == ["container", "inspect"]:
        answer = [state["container"]] if state["container"] else None
    elif argv[0] == "pull":
        state["images"].append(argv[1])
        sys.stdout.write("layer 1: Pull complete\n")
        return 0
    elif argv[0] == "rm":
        state["container"] = None
        return 0
    json.dump(answer, sys.stdout)
    return 0 if answer else 1


def python(argv: list[str], state: dict[str, Any]) -> None:
    """An interpreter whose environments hold recording programs too."""
    if argv[:2] == ["-m", "venv"]:
        os.makedirs(f"{argv[2]}/bin")
        os.symlink(LAUNCHER, f"{argv[2]}/bin/python")
    elif argv[:3] == ["-m", "pip", "install"]:
        if not argv[-1].endswith(".txt"):
            os.symlink(LAUNCHER, f"{os.path.dirname(sys.argv[0])}/vecmill")
        sys.stdout.write("Collecting torch\n")
    elif argv[0] == "-c" and "Python.h" in argv[1]:
        sys.stdout.write("3.12 True\n")


def getent(argv: list[str], state: dict[str, Any]) -> int:
    for account in state["accounts"]:
        if account.partition(":")[0] == argv[1]:
            sys.stdout.write(
                account if ":" in account else f"{account}:x:998:998::/var/lib/vecmill:/usr/sbin/nologin\n"
            )
            return 0
    return 2


def useradd(argv: list[str], state: dict[str, Any]) -> None:
    state["accounts"].append(argv[-1])


def userdel(argv: list[str], state: dict[str, Any]) -> None:
    state["accounts"].remove(argv[-1])


def loginctl(argv: list[str], state: dict[str, Any]) -> None:
    os.makedirs(f"{ROOT}/var/lib/systemd/linger")
    os.mknod(f"{ROOT}/var/lib/systemd/linger/{argv[-1]}")


def journalctl(argv: list[str], state: dict[str, Any]) -> None:
    sys.stdout.write(state["journal"])


def nvidia_smi(argv: list[str], state: dict[str, Any]) -> None:
    sys.stdout.write("GPU 0: NVIDIA GB10 (UUID: GPU-1)\n")


def vecmill(argv: list[str], state: dict[str, Any]) -> None:
    sys.stdout.write("0.1.0\n")


PROGRAMS: dict[str, Any] = {
    "systemctl": systemctl,
    "tailscale": tailscale,
    "docker": docker,
    "python": python,
    "vecmill": vecmill,
    "getent": getent,
    "useradd": useradd,
    "userdel": userdel,
    "loginctl": loginctl,
    "journalctl": journalctl,
    "nvidia-smi": nvidia_smi,
}
