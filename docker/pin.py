"""Which images are pinned by digest, and what their registries have now.

`python docker/pin.py --check` names each image without a digest; `python docker/pin.py` asks the registries for the
digest of each tag and writes it behind the tag, in the files of docker/ and in deploy.py's default. Knows the standard
library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = (
    *("docker/Dockerfile", "docker/Dockerfile.ngc", "docker/compose.yaml", "docker/.env.example"),
    *("docker/k8s/components/redis/redis.yaml", "deployment/layout.py"),
)
TAG = r"(?P<tag>[\w][\w.-]*)(?:@(?P<digest>sha256:[0-9a-f]{64}))?(?![\w./-])"
NAME = r"[a-z0-9][\w.-]*(?::\d+)?(?:/[\w.-]+)*"
# `image: name:tag`, `image: ${NAME:-name:tag}`, `FROM name:tag`, `IMAGE = "name:tag"`, `#VLLM_IMAGE=name:tag`
WHOLE = re.compile(rf"(?:image: [\"']?|:-|^FROM (?:--\S+ )*|^IMAGE = \"|^#?\w*IMAGE=)(?P<name>{NAME}):{TAG}", re.M)
# `ARG TAG=tag`, where there is a `FROM name:${TAG}`.
ARGUMENT = re.compile(rf"^ARG (?P<variable>\w+)={TAG}$", re.M)
OURS = re.compile(r"vecmill\b")
# A list of one image for each architecture, then a single image.
MANIFESTS = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Image:
    """An image that a file names."""

    file: str
    name: str
    tag: str
    digest: str | None
    end: int
    """Where the tag ends in the file's text."""

    @property
    def registry(self) -> str:
        first, slash, _ = self.name.partition("/")
        return first if slash and ("." in first or ":" in first) else "registry-1.docker.io"

    @property
    def repository(self) -> str:
        rest = self.name.removeprefix(f"{self.registry}/")
        return rest if "/" in rest or rest != self.name else f"library/{rest}"


def images(root: Path, files: tuple[str, ...]) -> Iterator[Image]:
    """All that the files name, but those that are built here."""
    for file in files:
        text = (root / file).read_text("utf-8")
        found = [(match["name"], match) for match in WHOLE.finditer(text)]
        for match in ARGUMENT.finditer(text):
            if base := re.search(rf"^FROM ({NAME}):\$\{{{match['variable']}}}", text, re.M):
                found.append((base[1], match))
        for name, match in found:
            if not OURS.match(name):
                yield Image(file, name, match["tag"], match["digest"], match.end("tag"))


def digest_now(image: Image) -> str:
    """The digest that the registry has for the tag. Raises OSError, KeyError."""
    local = image.registry.startswith(("localhost", "127.0.0.1"))
    url = f"{'http' if local else 'https'}://{image.registry}/v2/{image.repository}/manifests/{image.tag}"
    headers = {"Accept": MANIFESTS}
    try:
        return _digest(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        return _digest(url, {**headers, "Authorization": f"Bearer {_token(error.headers['WWW-Authenticate'])}"})


def _digest(url: str, headers: Mapping[str, str]) -> str:
    request = urllib.request.Request(url, headers=dict(headers), method="HEAD")  # noqa: S310 - of a file of this repository
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
        told: str = answer.headers["Docker-Content-Digest"] or ""
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", told):
        raise OSError(f"the registry told no digest: {told!r}")
    return told


def _token(challenge: str) -> str:
    """An anonymous one, as the registry's challenge says where."""
    told = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    url = f"{told['realm']}?service={told.get('service', '')}&scope={told.get('scope', '')}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:  # noqa: S310
        body = json.load(answer)
    return str(body.get("token") or body["access_token"])


def pin(root: Path, files: tuple[str, ...]) -> int:
    """Write the digest of each tag behind it; how many registries did not tell one."""
    failed = 0
    # From a file's end to its beginning: what is written moves what comes after it.
    for image in sorted(images(root, files), key=lambda one: one.end, reverse=True):
        try:
            digest = digest_now(image)
        except (OSError, KeyError, ValueError) as error:
            print(f"{image.name}:{image.tag} ({image.file}): {error}")
            failed += 1
            continue
        path = root / image.file
        text = path.read_text("utf-8")
        rest = text[image.end :].removeprefix(f"@{image.digest}") if image.digest else text[image.end :]
        path.write_text(f"{text[: image.end]}@{digest}{rest}", "utf-8")
        said = "as before" if digest == image.digest else f"now {digest}"
        print(f"{image.name}:{image.tag} ({image.file}): {said}")
    return failed


def options(argv: Sequence[str]) -> argparse.Namespace:
    """What the arguments say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only name the images without a digest")
    parser.add_argument("--root", type=Path, default=ROOT, help="of a repository")
    parser.add_argument("files", nargs="*", help="below the root; default: all that name images")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """0; 1 where an image has no digest, or a registry told none."""
    given = options(argv)
    files = tuple(given.files) or FILES
    if not given.check:
        return 1 if pin(given.root, files) else 0
    without = [image for image in images(given.root, files) if image.digest is None]
    for image in without:
        print(f"{image.name}:{image.tag} ({image.file}) has no digest: run `python docker/pin.py`")
    return 1 if without else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
