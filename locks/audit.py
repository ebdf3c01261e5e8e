"""Known vulnerabilities of the locked packages, by pip-audit, and what is accepted of them.

Ends with 1 where there is one that is not accepted, and with 2, which is not "none found", where no database of
advisories answers for every package; with `--or-skip` it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).parent
# dev.txt is all but Ray; torch-cpu.txt has no other versions than torch.txt. What only tests of Ray need is not served.
AUDITED = ("torch.txt", "server.txt", "dev.txt", "ray.txt", "build.txt", "audit.txt")
# Advisory: why it does no harm here, and until when. An entry that nothing needs any more is an error, too.
ACCEPTED: dict[str, str] = {}
SERVICES = ("pypi", "osv")


def findings(pip_audit: str, file: Path) -> dict[str, str]:
    """Advisory and package of each vulnerability. Raises ConnectionError: no service answers for each package."""
    told: list[str] = []
    for service in SERVICES:
        command = [pip_audit, "--requirement", str(file), "--no-deps", "--disable-pip", "--format", "json"]
        command += ["--vulnerability-service", service, "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except ValueError:
            told.append(f"{service}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1][:200]}")
            continue
        # Of a package that a service does not answer for it says that none is known.
        if skipped := [one["name"] for one in packages if "skip_reason" in one]:
            told.append(f"{service}: no answer for {len(skipped)} of {len(packages)} packages, such as {skipped[0]}")
            continue
        return {
            one[
                "id"
            ]: f"{package['name']} {package['version']}, mended in {', '.join(one['fix_versions']) or 'none yet'}"
            for package in packages
            for one in package["vulns"]
        }
    raise ConnectionError("; ".join(told))


def main(argv: list[str]) -> int:
    """0, 1 or 2, as above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pip-audit", default="pip-audit", help="the program")
    parser.add_argument("--or-skip", action="store_true", help="end with 0 where no database answers")
    parser.add_argument("files", nargs="*", type=Path, help="default: those of this folder")
    options = parser.parse_args(argv)
    found: dict[str, str] = {}
    try:
        for file in options.files or [LOCKS / name for name in AUDITED]:
            found |= findings(options.pip_audit, file)
    except ConnectionError as error:
        print(f"SKIPPED, NOT AUDITED: no database of advisories answers ({error}).")
        return 0 if options.or_skip else 2
    open_ones = {advisory: what for advisory, what in found.items() if advisory not in ACCEPTED}
    for advisory, what in open_ones.items():
        print(f"{advisory}: {what}. Take another version, or accept it in locks/audit.py and say why.")
    stale = [] if options.files else sorted(ACCEPTED.keys() - found.keys())
    for advisory in stale:
        print(f"{advisory} is accepted in locks/audit.py, but no locked package has it any more: remove it.")
    if not open_ones and not stale:
        print("No known vulnerability in the locked packages that is not accepted.")
    return 1 if open_ones or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
