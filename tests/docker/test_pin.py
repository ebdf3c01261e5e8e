"""Images are pinned by digest, and the tool that pins them asks a registry as an engine would."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deployment.layout import IMAGE

from tests.docker.parts import DOCKER, ROOT, run

PIN = str(DOCKER / "pin.py")
DIGEST = f"sha256:{'5' * 64}"


def test_every_image_has_a_digest() -> None:
    done = run([sys.executable, PIN, "--check"])
    assert (done.stdout, done.returncode) == ("", 0)


def test_an_image_without_a_digest_is_named(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("image: team/tool:1.2\n")
    done = run([sys.executable, PIN, "--check", "--root", str(tmp_path), "compose.yaml"])
    assert "team/tool:1.2 (compose.yaml) has no digest" in done.stdout
    assert done.returncode == 1


def test_every_file_that_names_an_image_is_looked_at() -> None:
    """A file that begins to name one has to be told to the tool."""
    files = re.findall(r'"((?:docker|deployment)/[^"]+)"', Path(PIN).read_text("utf-8"))
    for path in (path for folder in (DOCKER, ROOT / "deployment") for path in folder.rglob("*") if path.is_file()):
        lines = path.read_text("utf-8", "replace").splitlines()
        named = [line.strip() for line in lines if re.search(r'^\s*image: .*:|^FROM |^#?\w*IMAGE ?= ?"?\w', line)]
        if [line for line in named if "vecmill" not in line]:
            assert str(path.relative_to(ROOT)) in files, path


class Registry(BaseHTTPRequestHandler):
    """As Docker's: it wants a token, which its other address gives to anybody."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        address = str(self.headers["Host"])
        if self.headers["Authorization"] != "Bearer given":
            self.send_response(401)
            where = f'Bearer realm="http://{address}/token",service="here",scope="repository:team/tool:pull"'
            self.send_header("WWW-Authenticate", where)
        elif self.path == "/v2/team/tool/manifests/1.2" and "image.index" in self.headers["Accept"]:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
        else:
            self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        body = json.dumps({"token": "given"}).encode()
        self.send_response(200 if self.path == "/token?service=here&scope=repository:team/tool:pull" else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_digest_is_written_behind_its_tag(registry: str, tmp_path: Path) -> None:
    file, old = tmp_path / "compose.yaml", f"sha256:{'0' * 64}"
    text = f"image: {registry}/team/tool:1.2\nimage: ${{TOOL:-{registry}/team/tool:1.2@{old}}}\nimage: vecmill:local\n"
    file.write_text(text)
    done = run([sys.executable, PIN, "--root", str(tmp_path), "compose.yaml"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert file.read_text() == text.replace("tool:1.2\n", f"tool:1.2@{DIGEST}\n").replace(old, DIGEST)
    assert run([sys.executable, PIN, "--root", str(tmp_path), "compose.yaml"]).stdout.count("as before") == 2
    assert run([sys.executable, PIN, "--check", "--root", str(tmp_path), "compose.yaml"]).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "ARG BUNDLED=0\nARG BASE_TAG=1.2@OLD\nFROM --platform=linux/arm64 HERE/team/tool:1.2@OLD AS one\n"
        "FROM HERE/team/tool:${BASE_TAG}\n",
        'IMAGE = "HERE/team/tool:1.2@OLD"\n',
        "#TOOL_IMAGE=HERE/team/tool:1.2@OLD\nimage: 'HERE/team/tool:1.2@OLD'\n",
    ],
    ids=["Dockerfile", "Python", "env"],
)
def test_another_digest_takes_the_place_of_the_old_one_and_the_tag_stays(
    registry: str, tmp_path: Path, text: str
) -> None:
    old = text.replace("HERE", registry).replace("OLD", f"sha256:{'0' * 64}")
    (tmp_path / "file").write_text(old)
    done = run([sys.executable, PIN, "--root", str(tmp_path), "file"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "file").read_text() == old.replace(f"sha256:{'0' * 64}", DIGEST)
    unpinned = old.replace(f"@sha256:{'0' * 64}", "")
    (tmp_path / "file").write_text(unpinned)
    named = run([sys.executable, PIN, "--check", "--root", str(tmp_path), "file"]).stdout
    assert named.count(f"{registry}/team/tool:1.2 (file) has no digest") == unpinned.count("1.2")


def test_vllm_is_the_same_wherever_it_is_started() -> None:
    texts = [(ROOT / name).read_text("utf-8") for name in ("docker/compose.yaml", "docker/.env.example")]
    assert all(IMAGE in text for text in texts)


def test_a_tag_that_the_registry_does_not_have_is_named(registry: str, tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text(f"image: {registry}/team/tool:9\n")
    done = run([sys.executable, PIN, "--root", str(tmp_path), "compose.yaml"])
    assert done.returncode == 1
    assert "team/tool:9" in done.stdout
    assert "404" in done.stdout
