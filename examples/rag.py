#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "openai"]
# ///
"""Answer a question from a folder of Markdown and text files, with the OpenAI SDK: retrieve, rerank, generate.

vecmill finds the passages: `client.embeddings` for the files and the question, `POST /v1/rerank` for the order. A chat
model writes the answer from them alone: vecmill passes `/v1/chat/completions` on to GENERATION_URL where that is set,
and --chat-url names any other OpenAI-compatible server. Without --chat-model only the passages are shown. Needs
`pip install openai` beside vecmill; nothing of vecmill itself.

    GENERATION_URL=http://127.0.0.1:8000 vecmill serve &
    python examples/rag.py docs "How do I rotate an API key?" --chat-model Qwen/Qwen3-8B
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openai import APIConnectionError, OpenAI, OpenAIError

LONGEST = 1200  # characters of a passage
BATCH = 64  # texts per request
CANDIDATES = 30  # passages by cosine that the reranker sees
SHOWN = 100  # characters of a passage
SYSTEM = (
    "Answer the question from the numbered passages alone, in a few sentences, and name those you used like [2]. "
    "Where they do not say, say so."
)


class RagError(Exception):
    """What went wrong, in one sentence for the person at the terminal."""


@dataclass(frozen=True)
class Passage:
    """A piece of a file."""

    path: str
    text: str


def read_passages(folder: Path) -> list[Passage]:
    """The folder's .md and .txt files, cut between paragraphs."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt") and path.is_file())
    return [
        Passage(path.relative_to(folder).as_posix(), text)
        for path in files
        for text in _cut(path.read_text("utf-8", errors="replace"))
    ]


def _cut(text: str) -> Iterator[str]:
    """Whole paragraphs, as many as fit; a paragraph that is too long is a passage of its own."""
    passage = ""
    for paragraph in text.split("\n\n"):
        if passage and len(passage) + len(paragraph) > LONGEST:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip()
    if passage:
        yield passage


def embed(client: OpenAI, texts: Sequence[str], input_type: str) -> np.ndarray:
    """Unit vectors, float32, shape (texts, dimensions); `input_type`, query or passage, gives them that prompt."""
    vectors: list[list[float]] = []
    model = next(iter(client.models.list())).id  # the SDK wants a name: the server's default is listed first
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        answer = client.embeddings.create(model=model, input=part, extra_body={"input_type": input_type})
        vectors += [entry.embedding for entry in answer.data]
    array = np.asarray(vectors, dtype=np.float32)
    unit: np.ndarray = array / np.linalg.norm(array, axis=1, keepdims=True)
    return unit


def retrieve(client: OpenAI, question: str, passages: Sequence[Passage], top: int) -> list[tuple[float, Passage]]:
    """The `top` best passages as (reranker's score, passage), best first; cosine picks what the reranker sees."""
    vectors = embed(client, [passage.text for passage in passages], "passage")
    query = embed(client, [question], "query")[0]
    candidates = [passages[index] for index in np.argsort(-(vectors @ query), kind="stable")[:CANDIDATES]]
    body = {
        "query": question,
        "documents": [passage.text for passage in candidates],
        "top_n": min(top, len(candidates)),
    }
    # The SDK has no call for reranking; its `post` shares the client's address, key and retries.
    answer: Any = client.post("/rerank", body=body, cast_to=object)
    return [(float(result["relevance_score"]), candidates[result["index"]]) for result in answer["results"]]


def generate(client: OpenAI, model: str, question: str, passages: Sequence[Passage]) -> str:
    """The chat model's answer."""
    numbered = "\n\n".join(f"[{number}] {passage.text}" for number, passage in enumerate(passages, 1))
    answer = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{numbered}\n\nQuestion: {question}"},
        ],
    )
    return answer.choices[0].message.content or ""


def run(options: argparse.Namespace) -> None:
    """Retrieve and answer as the options say; raises RagError or an error of the SDK with what stopped it."""
    passages = read_passages(options.folder)
    if not passages:
        raise RagError(f"There are no .md or .txt files with text in {options.folder}.")
    key = os.environ.get("API_KEY") or "none"  # the SDK wants one; a server without keys takes any
    url = options.url.rstrip("/")
    best = retrieve(OpenAI(base_url=f"{url}/v1", api_key=key), options.question, passages, options.top)
    for number, (score, passage) in enumerate(best, 1):
        print(f"[{number}] {score:.3f}  {passage.path}: {' '.join(passage.text.split())[:SHOWN]}")
    if options.chat_model is not None:
        chat = OpenAI(base_url=f"{(options.chat_url or url).rstrip('/')}/v1", api_key=key)
        print(f"\n{generate(chat, options.chat_model, options.question, [passage for _, passage in best])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 1 with one sentence on stderr if not."""
    parser = argparse.ArgumentParser(description="Answer a question from a folder's files, with a vecmill server.")
    parser.add_argument("folder", type=Path, help="folder of .md and .txt files")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the vecmill server (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="passages shown and answered from (default: %(default)s)")
    parser.add_argument("--chat-model", metavar="NAME", help="the model that writes the answer (default: none)")
    parser.add_argument("--chat-url", metavar="URL", help="the server that has it (default: as --url)")
    try:
        run(parser.parse_args(arguments))
    except APIConnectionError as error:
        print(
            f"No server answers at {error.request.url}; start `vecmill serve` or name one with --url.", file=sys.stderr
        )
        return 1
    except (RagError, OpenAIError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
