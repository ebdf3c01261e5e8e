"""All the ways in which clients say whether a text is a query or a document."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from vecmill.core.types import PromptChoice
from vecmill.http.bounds import Word
from vecmill.http.dialects.inputs import LONGEST_INSTRUCTION

# NIM's, Cohere's and Voyage's `input_type`, Jina's `task`.
CHOICES: dict[str, PromptChoice] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query", "code.query"), PromptChoice(is_query=True)),
    **dict.fromkeys(
        ("passage", "document", "search_document", "retrieval.passage", "code.passage"), PromptChoice(is_query=False)
    ),
    "classification": PromptChoice(task="classification"),
    "clustering": PromptChoice(task="clustering"),
    "separation": PromptChoice(task="clustering"),
    "text-matching": PromptChoice(task="text-matching"),
}


def parse_use(value: Any) -> Any:
    """One of the values, in any case.

    Raises:
        ValueError: it is none.
    """
    if value == "image":
        raise ValueError("images are not served here")
    if isinstance(value, str) and value.lower() not in CHOICES:
        raise ValueError(f"must be one of {', '.join(CHOICES)}")
    return value.lower() if isinstance(value, str) else value


Use = Annotated[str | None, BeforeValidator(parse_use), Word]


class PromptFields(BaseModel):
    """Of several that are given, the first here wins. None: the model's default prompt, where its files name one."""

    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="The task in your own words, in place of the one in the model's query prompt; empty: none.",
    )
    prompt_name: str | None = Field(None, description="One of the model's prompts by name; /v1/models lists them.")
    task: Use = Field(None, description="Jina: `retrieval.query`, `retrieval.passage`, `text-matching`, ...")
    input_type: Use = Field(
        None, description="NIM, Cohere, Voyage: `query`, `passage`, `search_query`, `search_document`, `document`, ..."
    )
    is_query: bool | None = Field(
        None,
        description="CodeCartographer: the model's own query prompt (true) or document prompt (false) goes before "
        "each text.",
    )

    def prompt_choice(self) -> PromptChoice:
        """What the request says; nothing said is the model's default prompt, if it has one.

        An instruction stands in place of the prompt, not of what the texts are.
        """
        use = self.task or self.input_type
        said = CHOICES[use] if use else PromptChoice(self.is_query)
        if self.prompt_name is not None:
            said = PromptChoice(prompt_name=self.prompt_name)
        return said if self.instruction is None else replace(said, instruction=self.instruction)
