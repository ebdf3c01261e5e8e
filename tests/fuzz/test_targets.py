"""A few hundred changed inputs of each target, the same every time; at night tens of thousands, others each time."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import BASES, TARGETS, Target, check_sentence, load, written_base
from vecmill.core.errors import StartupError
from vecmill.models.tokenizer_files import read_file

QUICK = {"body_coding": 60, "checkpoint_files": 30, "requests": 150, "upload_form": 200}
NIGHTLY_SECONDS = 60


def run(target: Target, data: bytes) -> None:
    """The target, whose input is shown where it fails. A panic of a library is no Exception."""
    try:
        target.run(data)
    except BaseException as error:
        error.add_note(f"input: {data[:3000]!r}")
        raise


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs(name: str) -> None:
    source, target = random.Random(name), TARGETS[name]
    seeds = target.seeds()
    for seed in seeds if name != "checkpoint_files" else ():
        run(target, seed)
    for _ in range(QUICK.get(name, 500)):
        run(target, mutated(source.choice(seeds), target.words, source))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_inputs(name: str) -> None:
    source, target, until = random.Random(), TARGETS[name], time.monotonic() + NIGHTLY_SECONDS
    pool = [*target.seeds()]
    while time.monotonic() < until:
        run(target, mutated(source.choice(pool), target.words, source))


# What was found: each is an input of a target that broke a promise.
FOUND = {
    "a head of HTTP/0.9, byte for byte": ("requests", b"\x01GET /\n\r\n\r\n"),
    "a form with text before its first boundary, cut at another place": (
        "upload_form",
        b"\x05\n" + b"b" * 40 + b"--XX--\r\n",
    ),
    "a control character in a key that an error names": ("batch_lines", b'{"a\x7f": "\\ud83d"}'),
    "a vector beyond float32 in another server's answer": (
        "batch_results",
        b'{"custom_id": "7", "response": {"status_code": 200, "body": {"data": [{"embedding": [1e308]}]}}}',
    ),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found(found: str) -> None:
    name, data = FOUND[found]
    run(TARGETS[name], data)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("model.safetensors", b'"shape":', b'"sharp":', "has no type, shape and place of the tensor"),
        ("tokenizer_config.json", b'"cls_token"', b'"cls_tok\\nen"', r"cls_tok\nen"),
        ("modules.json", b'"1_Pooling"', b'"1_Pool\\ud83ding"', r"1_Pool\ud83ding"),
    ],
)
def test_what_was_found_in_files_of_checkpoints(file: str, before: bytes, after: bytes, said: str) -> None:
    folder, files = written_base(0)
    path = folder / file
    assert before in files[file]
    path.write_bytes(files[file].replace(before, after, 1))
    try:
        with pytest.raises(StartupError) as refused:
            load(folder, BASES[0].task)
    finally:
        path.write_bytes(files[file])
    check_sentence(refused.value.message, said)


# With a token that it does not list.
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("model", "template"),
    [({"continuing_subword_prefix": "##"}, None), ({}, TEMPLATE)],
    ids=["when it is read", "when it is run"],
)
def test_a_tokenizer_in_which_the_library_panics_is_refused(
    tmp_path: Path, model: dict[str, str], template: dict[str, Any] | None
) -> None:
    definition = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **model},
        "post_processor": template,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition), "utf-8")
    with pytest.raises(StartupError) as refused:
        read_file(path)
    check_sentence(refused.value.message, "the tokenizers library fails on it")
