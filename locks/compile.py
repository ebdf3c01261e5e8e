"""Writes the lock files beside it, each package with the hashes of its files, and the SBOM that the wheel carries.

`make locks` runs it; it needs uv, cyclonedx-py and the package index. All but lowest.txt and audit.txt come from one
resolution, so that a package has the same version in each. They serve every Python, system and processor that vecmill
runs on. The versions that are in the files stay, unless pyproject.toml or constraints.txt ask for others, or
`make locks ARGS=--upgrade` for newer ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).parent
ROOT = LOCKS.parent
# torch, and what only its CUDA build needs: installed from torch.txt, or torch without CUDA from torch-cpu.txt.
TORCH = re.compile(r"torch|triton|nvidia-(?!ml-py)[a-z0-9-]+|cuda-[a-z0-9-]+")
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)")
HEAD = "# Written by `make locks`. {}\n"

SERVER = ("otel", "redis", "token-ids")
# The tests of Ray, which have an environment of their own.
RAY_TESTS = "httpx\nhypothesis\nmoto[server]\npytest\npytest-asyncio\npytest-timeout\npytest-xdist\n"
AUDIT = "cyclonedx-bom>=7,<8\npip-audit>=2.9,<3\nuv>=0.9,<1\n"
BUILD = "editables>=0.6,<1\nhatch-fancy-pypi-readme>=24.1\nhatchling>=1.28\n"
LOWEST_TESTS = "hypothesis\npytest\npytest-asyncio\npytest-timeout\npytest-xdist\nsentence-transformers\n"


@dataclass(frozen=True)
class Lock:
    """One file."""

    name: str
    what: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    more: str = ""
    """Requirements beside the project's."""
    project: bool = True
    """Whether what the project depends on is in it."""


EVERYTHING = Lock(
    "everything",
    "",
    extras=("otel", "parquet", "plot", "ray", "ray-data", "redis", "token-ids"),
    groups=("dev",),
    more=RAY_TESTS + BUILD,
)
FILES = (
    Lock("build", "What builds the package.", more=BUILD, project=False),
    Lock(
        "server", "The server: images, deploy.py, `make serve`. torch is in torch.txt or torch-cpu.txt.", extras=SERVER
    ),
    Lock("ray", "What the extra `ray` adds to server.txt.", extras=(*SERVER, "ray")),
    Lock(
        "dev",
        "The tests: every tool and extra but Ray. torch is in torch.txt or torch-cpu.txt.",
        extras=(*SERVER, "parquet", "plot"),
        groups=("dev",),
        more=BUILD,
    ),
    Lock(
        "ray-tests",
        "The tests of Ray. torch is in torch.txt or torch-cpu.txt.",
        extras=("parquet", "ray", "ray-data", "redis", "token-ids"),
        more=RAY_TESTS + BUILD,
    ),
)


def resolve(lock: Lock, constraints: Path, before: str, options: list[str]) -> str:
    """The pins and hashes of a lock's packages, for all platforms; versions of `before` stay where they may."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, written = Path(folder) / "requirements.in", Path(folder) / "lock.txt"
        wanted.write_text(lock.more, "utf-8")
        written.write_text(before, "utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "--constraints", str(constraints), *options]
        for extra in lock.extras:
            command += ["--extra", extra]
        for group in lock.groups:
            command += ["--group", group]
        command += ["--output-file", str(written), str(wanted), *(["pyproject.toml"] if lock.project else [])]
        subprocess.run(command, cwd=ROOT, check=True)
        return written.read_text("utf-8")


def entries(text: str) -> dict[str, str]:
    """The lines of each package of a lock file, by its name and marker: one may be there twice, for two Pythons."""
    found: dict[str, str] = {}
    key = ""
    for line in text.splitlines(keepends=True):
        if PIN.match(line):
            key = line.rstrip("\\\n ")
            found[key] = ""
        if key:
            found[key] += line
    return found


def name(key: str) -> str:
    """The package's name."""
    match = PIN.match(key)
    return match[1] if match else ""


def write(file: str, what: str, parts: dict[str, str]) -> None:
    """Write a lock file."""
    (LOCKS / f"{file}.txt").write_text(HEAD.format(what) + "".join(parts.values()), "utf-8")


def main(options: list[str]) -> None:
    """Resolve everything once, then each file within that."""
    before = "".join((LOCKS / f"{lock.name}.txt").read_text("utf-8") for lock in FILES if _there(lock.name))
    before = "".join(dict(entries(before + (_read("torch")))).values())
    everything = resolve(EVERYTHING, ROOT / "constraints.txt", before, options)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("".join(f"{key}\n" for key in entries(everything)))
        pins.flush()
        found = {lock.name: entries(resolve(lock, Path(pins.name), everything, [])) for lock in FILES}
    torch = {key: lines for key, lines in found["dev"].items() if TORCH.fullmatch(name(key))}
    write("torch", "torch as the package index has it, with CUDA on Linux.", torch)
    found["ray"] = {key: lines for key, lines in found["ray"].items() if key not in found["server"]}
    for lock in FILES:
        parts = {key: lines for key, lines in found[lock.name].items() if not TORCH.fullmatch(name(key))}
        write(lock.name, lock.what, parts)
    audit = Lock("audit", "What checks the dependencies: `make audit`, `make locks`.", more=AUDIT, project=False)
    write(audit.name, audit.what, entries(resolve(audit, Path("/dev/null"), _read("audit"), options)))
    lowest = Lock("lowest", "The lowest versions that are allowed.", extras=("token-ids",), more=LOWEST_TESTS + BUILD)
    constraints = ROOT / "constraints-lowest.txt"
    write(lowest.name, lowest.what, entries(resolve(lowest, constraints, _read("lowest"), options)))
    write_sbom()


SBOM = LOCKS / "vecmill.cdx.json"


def write_sbom() -> None:
    """What a server consists of, as CycloneDX: the wheel carries it."""
    version = re.search(r'__version__ = "(.*?)"', (ROOT / "src/vecmill/__init__.py").read_text("utf-8"))
    command = ["cyclonedx-py", "requirements", "--pyproject", "pyproject.toml", "--output-reproducible"]
    command += ["--spec-version", "1.6", "--output-format", "JSON", "-"]
    locked = _read("server") + _read("torch")
    told = subprocess.run(command, cwd=ROOT, input=locked, capture_output=True, text=True, check=True).stdout
    bom = json.loads(told)
    bom["metadata"]["component"] |= {"version": version[1] if version else "", "purl": "pkg:pypi/vecmill"}
    bom["metadata"].pop("tools")
    names = {"root-component": "root-component"}
    for component in bom["components"]:
        del component["description"]  # the line of the lock file
        marker = f"#{component['bom-ref']}" if component["purl"] in names.values() else ""  # two lines for two Pythons
        for told in component["externalReferences"]:
            told |= {"url": component["purl"], "comment": "a file that may be installed"}
        names[component["bom-ref"]] = component["bom-ref"] = component["purl"] + marker
    everything = sorted(name for name in names.values() if name != "root-component")
    bom["dependencies"] = [{"ref": "root-component", "dependsOn": everything}, *({"ref": name} for name in everything)]
    SBOM.write_text(json.dumps(bom, indent=1) + "\n", "utf-8")


def _there(file: str) -> bool:
    return (LOCKS / f"{file}.txt").is_file()


def _read(file: str) -> str:
    return (LOCKS / f"{file}.txt").read_text("utf-8") if _there(file) else ""


if __name__ == "__main__":
    main(sys.argv[1:])
