"""Files that administrators edit."""

from __future__ import annotations

from deployment.files import conceal, merged, settings
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.sampled_from(["HOST", "PORT", "HF_TOKEN", "EXTRA"])
PLAIN = st.text("abcdefghij0123456789./:-", max_size=12)
LINES = st.one_of(
    st.builds("{}={}".format, NAMES, PLAIN),
    st.builds("  export {} = '{}'  # why".format, NAMES, PLAIN),
    st.builds('{}="{}"'.format, NAMES, PLAIN),
    st.builds("# {}={}".format, NAMES, PLAIN),
    st.sampled_from(["", "# a comment", "not a line of it"]),
)
SETTINGS = st.dictionaries(NAMES, PLAIN.filter(bool))


@given(st.lists(LINES), SETTINGS, SETTINGS)
def test_only_what_is_asked_for_changes(lines: list[str], changes: dict[str, str], additions: dict[str, str]) -> None:
    before = "".join(f"{line}\n" for line in lines)
    after = merged(before, changes, additions)
    assert settings(after) == {**additions, **settings(before), **changes}
    kept = [line for line in lines if not set(settings(line)) & set(changes)]
    assert [line for line in after.splitlines() if line in kept][: len(kept)] == kept
    assert merged(after, changes, additions) == after


def test_other_lines_stay_as_they_are_byte_for_byte() -> None:
    """A break that systemd and the server do not take for one makes no setting of what follows; and nothing is lost."""
    before = "# was\u2028PORT=9\r\nHOST=a\r\nX=\x0cA=b\n"
    assert settings(before) == {"HOST": "a", "X": "A=b"}
    assert merged(before, {"HOST": "b"}, {"PORT": "1"}) == before.replace("HOST=a", "HOST=b") + "PORT=1\n"


def test_values_as_the_server_reads_them() -> None:
    text = "PORT=8001 # of old\nHOST='0.0.0.0' # all\nexport A = b\nEMPTY=\nHASH=a#b\n"
    assert settings(text) == {"PORT": "8001", "HOST": "0.0.0.0", "A": "b", "EMPTY": "", "HASH": "a#b"}


def test_secrets_are_concealed_and_the_rest_is_not() -> None:
    for name in ("HF_TOKEN", "API_KEY", "ADMIN_API_KEY", "GENERATION_API_KEY", "REDIS_URL"):
        assert conceal(f"export {name} = sesame") == f"export {name}=(not shown)"
    for line in (
        "#API_KEY=sesame",
        "api_key='open sesame'",
        'Environment="HF_TOKEN=sesame" A=b',
        "EXTRA_ARGS=--api-key sesame --seed 1",
        "HTTPS_PROXY=http://ann:sesame@proxy:3128",
        "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20sesame",
    ):
        assert "sesame" not in conceal(line)
        assert conceal(line).endswith("=(not shown)")
    for line in (
        "API_KEY_FILE=/etc/vecmill/api-keys",
        "HF_TOKEN=",
        "# HF_TOKEN=hf_...",
        "PORT=8001",
        "TOKEN_IDS=model",
    ):
        assert conceal(line) == line
