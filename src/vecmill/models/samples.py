"""Texts by which two ways of running a model are compared: prose, questions, code and several languages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from vecmill.core.types import Row, Task
from vecmill.models.chat_template import filled
from vecmill.models.checkpoint import Checkpoint
from vecmill.models.rerank_prompt import rerank_form
from vecmill.models.tokenizer_files import ReadTokenizer, Template

QUESTIONS = (
    "How do plants make oxygen?",
    "python function that reads a file line by line",
    "What is the capital of France?",
    "Wie lange ist die Kündigungsfrist?",
)
TEXTS = (
    "Plants take in carbon dioxide and water, and with the energy of light they make sugar and oxygen of them.",
    "def read_lines(path):\n    with open(path, encoding='utf-8') as file:\n        return [line.rstrip() for line in "
    "file]",
    "Paris is the capital and the largest city of France, with more than two million people.",
    "Das Arbeitsverhältnis kann mit einer Frist von vier Wochen zum Fünfzehnten oder zum Ende eines Monats gekündigt "
    "werden.",
    "hello",
    "No.",
    "The quick brown fox jumps over the lazy dog.",
    "Invoice 2024-0193: 3 x USB-C cable at 7.99 EUR, 1 x dock at 129.00 EUR, total 152.97 EUR, due within 14 days.",
    "SELECT customer, SUM(amount) AS total FROM orders WHERE placed >= '2024-01-01' GROUP BY customer ORDER BY total;",
    "for (int i = 0; i < n; ++i) { sum += values[i] * weights[i]; }",
    "La photosynthèse transforme l'énergie de la lumière en énergie chimique.",
    "El envío tarda entre tres y cinco días laborables; los gastos de envío corren a cargo del comprador.",
    "東京は日本の首都で、世界で最も人口の多い都市圏の一つです。",
    "机器学习使计算机能够从数据中学习。",
    "Москва является столицей России и крупнейшим городом страны.",
    "القاهرة هي عاصمة مصر وأكبر مدنها.",
    "The patient was given 5 mg of the drug twice a day; after two weeks her blood pressure had fallen to 128/82 mmHg.",
    "A contract is void if it was made under duress, and voidable if one of the parties was a minor.",
    "Shares fell by four percent after the company had lowered its forecast for the second time this year.",
    "To reset the device, hold the button for ten seconds until the light blinks red, then let go.",
    "https://example.org/docs/install?version=2.4#linux",
    '{"name": "widget", "size": [3, 4, 5], "tags": ["blue", "metal"], "price": 19.5}',
    "Error: connection refused (os error 111) while connecting to 10.0.0.7:5432, giving up after 5 attempts",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)",
    "What time does the museum open on Sundays, and are children under six free?",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Mix the flour with the salt, rub in the butter, add the water little by little and knead until it is smooth.",
    "The bridge, opened in 1932, has a span of 503 metres and carries eight lanes of traffic, two railway tracks, a "
    "footway and a cycleway.",
    "E = mc^2 says that mass and energy are two forms of the same thing; c is the speed of light, 299,792,458 m/s.",
    "git rebase --interactive HEAD~3 lets you reorder, squash and reword the last three commits before you push them.",
    "Great product, works as described!!! Delivery took a week longer than promised though :( 4/5",
    "A long text is more than its words. When a document is cut into pieces, each piece has to stand for itself: a "
    "heading that is far away no longer says what a number means, and a pronoun has lost the noun that it stands for. "
    "So pieces overlap, or carry the title of their section with them, and whoever searches gets back the paragraph "
    "that answers the question together with enough of what is around it to be understood.",
)
"""32 of them."""
LONGEST = 512  # tokens


def sample_rows(checkpoint: Checkpoint, tokenizer: ReadTokenizer) -> list[Row]:
    """A row for each of TEXTS, or for a reranker of each with a question, as the model reads them."""
    encode = Tokenizer.from_str(tokenizer.definition)
    encode.no_truncation()
    encode.no_padding()
    most = min(LONGEST, checkpoint.max_model_len)

    def ids(text: str) -> list[int]:
        found: list[int] = encode.encode(text, add_special_tokens=False).ids
        return found

    if checkpoint.task is Task.EMBED:
        end = checkpoint.text_format.end_token
        last = None if end is None else encode.token_to_id(end)
        return [_row(_around(tokenizer.around, ids(text), most, last)) for text in TEXTS]
    pairs = [(QUESTIONS[number % len(QUESTIONS)], text) for number, text in enumerate(TEXTS)]
    prompt = rerank_form(checkpoint).prompt
    if prompt is None:
        template = tokenizer.around_pair or tokenizer.around
        return [_pair(template, ids(question), ids(text), most) for question, text in pairs]
    instruction = prompt.default_instruction or ""
    pieces = prompt.instructed if instruction else prompt.plain
    # Cut in front, as the answer follows the prompt's last words.
    return [_row(ids(filled(pieces, instruction, question, text))[-most:]) for question, text in pairs]


def _row(ids: Sequence[int], second_text: int | None = None) -> Row:
    return Row(np.array(ids or [0], dtype=np.int32), second_text=second_text)


def _around(template: Template, ids: list[int], most: int, end: int | None) -> list[int]:
    after = template.after if end is None or template.after[-1:] == [end] else [*template.after, end]
    return [*template.before, *ids[: max(1, most - len(template.before) - len(after))], *after]


def _pair(template: Template, question: list[int], text: list[int], most: int) -> Row:
    head = [*template.before, *question, *template.between]
    room = max(1, most - len(head) - len(template.after))
    return _row([*head, *text[:room], *template.after][:most], len(head) if template.second_type else None)
