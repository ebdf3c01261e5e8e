"""The server that people write by hand and vecmill replaces: FastAPI, sentence-transformers, one lock.

It is kept as good as such servers are: float32, normalised vectors, the model's own batching within a
request, and a thread per request, so that parsing and answering go on while another request computes.

    python -m benchmarks.serving.reference_server --port 8090
"""

import argparse
from pathlib import Path
from threading import Lock
from typing import Any

import uvicorn
from benchmarks.lib.minilm import bundled_model
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

BATCH = 32  # texts per forward pass, sentence-transformers' own default


class ReferenceRequest(BaseModel):
    """Body of POST /embed."""

    inputs: list[str]


def create_app(model_folder: Path) -> FastAPI:
    """An app that serves the model in the folder."""
    model = SentenceTransformer(str(model_folder), local_files_only=True)
    lock = Lock()
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "device": str(model.device), "dtype": str(model.dtype)}

    @app.post("/embed")
    def embed(request: ReferenceRequest) -> list[list[float]]:
        with lock:
            vectors = model.encode(request.inputs, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
        rows: list[list[float]] = vectors.tolist()
        return rows

    return app


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: the bundled MiniLM)")
    options = parser.parse_args()
    app = create_app(options.model or bundled_model())
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
