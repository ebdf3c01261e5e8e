"""The example must work as its docstring says, from the command line against a real server."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.examples.command_line import run_example, start_example
from tests.faults.service import Service, service, until
from tests.servers import RunningServer, free_port
from tests.tiny_checkpoints import tiny_bert

EXAMPLE = "codebase_search.py"
FILES = {
    "billing/tax.py": '''
class TaxTable:
    """Value added tax rates by country."""

    def add_tax(self, net, country):
        """Return the gross price of an invoice."""
        return net * (1 + self.rates[country])
''',
    "storage.py": '''
import shutil


def remove_folder(path):
    """Delete a folder with all files in it."""
    shutil.rmtree(path)


async def resize_image(image, width):
    """Scale a picture to a width in pixels."""
    return image.resize((width, image.height * width // image.width))
''',
    "tests/test_storage.py": "def test_nothing():\n    pass\n",
    "broken.py": "def half(:\n",
}


CHUNKS = 3000


def test_finds_code_by_its_meaning_and_closes_its_job(server: RunningServer, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    for name, source in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)

    ran = run_example(
        EXAMPLE,
        str(folder),
        "--url",
        server.url,
        "--query",
        "make a photo smaller",
        "--query",
        "price with VAT",
        "--top",
        "2",
    )

    assert ran.returncode == 0, ran.stderr
    assert "4 functions and classes" in ran.stdout
    photo, price = ran.stdout.split("make a photo smaller")[1].split("price with VAT")
    best_photo, best_price = (table.strip().splitlines()[1].split() for table in (photo, price))
    assert best_photo[1:3] == ["storage.py:10", "resize_image"]
    assert best_price[1].startswith("billing/tax.py:")
    assert "cache already" not in ran.stdout
    job = next(job for job in httpx.get(f"{server.url}/jobs").json()["recent"] if job["project"] == "shop")
    assert (job["status"], job["current"], job["total_chunks"]) == ("completed", 4, 4)


def test_says_in_one_sentence_that_no_server_answers() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"

    ran = run_example(EXAMPLE, "--url", nowhere)

    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"No server answers at {nowhere}")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.nightly
def test_a_server_killed_half_way_computes_nothing_twice(tmp_path: Path, minilm_folder: Path) -> None:
    folder, state, log = tmp_path / "many", tmp_path / "state", tmp_path / "log"
    folder.mkdir()
    source = "".join(f"def function_{n}(x):\n    return x + {n}\n\n\n" for n in range(CHUNKS))
    (folder / "many.py").write_text(source)
    model = tiny_bert(tmp_path / "tiny", minilm_folder)
    with service(model, state, log, {"CACHE_MAX_BYTES": "100000000"}) as server:
        server.start()
        arguments = (str(folder), "--url", server.url, "--query", "add seven", "--top", "1")
        with start_example(EXAMPLE, *arguments) as first:
            until(lambda: progress(server) > CHUNKS // 2)
            server.kill()
            _, stderr = first.communicate(timeout=100)
        assert (first.returncode, len(stderr.splitlines())) == (1, 1)
        server.start()
        kept = until(lambda: server.get("/cache")["entries"])
        assert kept > CHUNKS // 4

        ran = run_example(EXAMPLE, *arguments)

        assert ran.returncode == 0, ran.stderr
        match = re.search(rf"([0-9,]+) of {CHUNKS:,} chunks were in the server's cache already", ran.stdout)
        assert match, ran.stdout
        cached = int(match[1].replace(",", ""))
        assert cached == kept
        # The query is computed too. It comes a second time for the reranking, from the cache or not.
        assert server.get("/stats")["texts_computed"] - (CHUNKS - cached) in (1, 2)
        server.assert_healthy()


def progress(server: Service) -> int:
    """Chunks that the only job has done; 0 before there is one."""
    jobs: list[dict[str, Any]] = server.get("/jobs")["active"]
    return int(jobs[0]["current"]) if jobs else 0
