"""What the fake systemctl starts: a server that is loading the first times it is asked, then ready."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

READY = {"status": "ok", "embedding_models": ["all-MiniLM-L6-v2"], "rerank_models": [], "device": "cpu"}


def serve(name: str, port: int, state: str) -> None:
    """Until killed. `loading` in the file `state` is how often it is asked before it is ready."""
    polls = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal polls
            polls += self.path == "/health"
            with open(state, encoding="utf-8") as file:
                loading = polls < json.load(file)["loading"]
            if self.path == "/v1/models":
                self.answer(200, {"data": [{"id": "Qwen/Qwen3-4B"}]})
            elif not name.startswith("qmd-embed"):
                self.answer(503 if loading else 200, {})
            elif self.path == "/health":
                progress = {"status": "loading", "percent": 40 * polls, "message": f"loading part {polls}"}
                self.answer(503 if loading else 200, progress if loading else READY)
            else:
                self.answer(503 if loading else 200, {"ready": not loading})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
