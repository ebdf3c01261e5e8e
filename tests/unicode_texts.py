"""Texts that any client may send, for tests that draw them: all of Unicode, and what tokenizers stumble over."""

from __future__ import annotations

from hypothesis import strategies as st

MARKS = "\u0301\u0336\u0e47\u20dd\u200d\ufe0f\u05b0\u1ab0"  # of several kinds that join what is before them
ODD = (
    "\0\t\r\x1b\x7f\x85\xa0\xad\u061c"
    + "\u200b\u200e\u2028\u202e\u2060\u3000\ufdfd\ufeff\ufffc\ufffd\uffff\U000e0041\U0010ffff"
)
WORDS = (
    *("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]", "<s>", "</s>", "<pad>", "<unk>", "<bos>", "<eos>", "##ing", "▁the"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "[INST]",
        "Ġa",
        "İ",
        "ǅ",
        "ﬃ",
        "Ω",
        "ß",
        "한글",
        "한",
        "👨\u200d👩\u200d👧",
    ),
)

_parts = (
    st.text(max_size=20)
    | st.text(alphabet=MARKS + ODD + "aé你", max_size=20)
    | st.sampled_from(WORDS)
    | st.sampled_from([" ", "\n", "  ", "a", "word "])
)
_runs = st.tuples(st.text(min_size=1, max_size=2) | st.sampled_from([*MARKS, *ODD]), st.integers(2, 3000)).map(
    lambda run: run[0] * run[1]
)

texts = st.lists(_parts, max_size=6).map("".join) | st.tuples(_parts, _runs, _parts).map("".join)
"""Characters that UTF-8 has, so none that is half of a surrogate pair."""

with_halves = st.tuples(_parts, st.characters(categories=["Cs"]), _parts).map("".join)
"""With half of a surrogate pair, which JSON can say and UTF-8 cannot."""
