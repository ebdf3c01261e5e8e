"""The words that Qwen3-Reranker was trained with. Reads no tensors.

Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B (the transformers recipe; single line breaks).
"""

from __future__ import annotations

from tokenizers import Tokenizer

from vecmill.core.errors import StartupError
from vecmill.models.checkpoint import Checkpoint

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def question(instruction: str, query: str) -> str:
    """What all documents of a request have before them. It ends where the tokenizer always splits: before a space."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"


def answer(document: str) -> str:
    """What follows the question; the space belongs to the document's first word."""
    return f" {document}"


def answer_tokens(checkpoint: Checkpoint) -> tuple[int, int]:
    """The ids of "yes" and "no", from the LogitScore module or else from the tokenizer.

    Raises:
        StartupError: the tokenizer has no such tokens, so it is another model's.
    """
    said = checkpoint.logit_score
    if "true_token_id" in said and "false_token_id" in said:
        return int(said["true_token_id"]), int(said["false_token_id"])
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    if yes is None or no is None:
        raise StartupError(f"{checkpoint.named}: {checkpoint.tokenizer_file} has no tokens `yes` and `no`.")
    return yes, no
