"""The example must work as its docstring says, from the command line against a real server."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
from benchmarks.servers import RunningServer, free_port

EXAMPLE = Path(__file__).parent.parent / "examples" / "codebase_search.py"
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


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A wide terminal, or rich would cut the lines that the tests look at.
    environment = os.environ | {"COLUMNS": "160", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)


def test_finds_code_by_its_meaning_and_closes_its_job(server: RunningServer, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    for name, source in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)

    ran = run_example(
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
    job = next(job for job in httpx.get(f"{server.url}/jobs").json()["recent"] if job["project"] == "shop")
    assert (job["status"], job["current"], job["total_chunks"]) == ("completed", 4, 4)


def test_says_in_one_sentence_that_no_server_answers() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"

    ran = run_example("--url", nowhere)

    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"No server answers at {nowhere}")
    assert len(ran.stderr.splitlines()) == 1
