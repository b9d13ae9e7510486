"""Names of files that models bring along: no text leads out of a directory, and ordinary names stay as they are."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.formats.names import LONGEST_NAME, hidden_path, printable, safe_name, shortened


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmolLM2 135M Instruct", "SmolLM2 135M Instruct"),
        ("Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("модель_v1.0", "модель_v1.0"),
        ("../../etc/passwd", "etc-passwd"),
        ("/etc/passwd", "etc-passwd"),
        ("C:\\Windows\\x", "C--Windows-x"),
        ("..", ""),
        ("", ""),
        (".hidden", "hidden"),
        ("--fresh", "fresh"),
        ("a\nb\x00c\x1b[2Jd", "a-b-c-[2Jd"),
        ("a\u202egnp.exe", "a-gnp.exe"),
        ("a\ud800b", "a-b"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("Com1 .x", "_Com1 .x"),
        ("console", "console"),
        ("name. . ", "name"),
    ],
)
def test_text_becomes_a_name(text, name):
    assert safe_name(text) == name


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=400), st.integers(60, LONGEST_NAME))
def test_no_text_leads_anywhere(text, longest):
    name = safe_name(text, longest)
    assert len(name.encode()) <= longest
    assert name == safe_name(text, longest) and safe_name(name, longest) == name
    assert not name or (Path("/d") / name).resolve().parent == Path("/d")
    assert not name.startswith((".", "-")) and not name.endswith((".", " "))
    assert not any(
        unicodedata.category(c).startswith("C") and unicodedata.category(c) not in ("Co", "Cn") for c in name
    )


def test_long_names_stay_different_and_fit_in_bytes():
    long = ["é" * 300 + str(i) + "-Q4_K" for i in range(50)]
    short = [shortened(name, 200) for name in long]
    assert len(set(short)) == 50 and all(len(name.encode()) <= 200 and name.endswith("-Q4_K") for name in short)
    assert shortened("x" * 200, 200) == "x" * 200
    hidden = {hidden_path(Path("d") / name, "partial") for name in ("a" * 255, "a" * 254 + "b", "a")}
    assert len(hidden) == 3 and all(len(path.name) <= LONGEST_NAME and path.name.startswith(".a") for path in hidden)


def test_what_a_terminal_obeys_or_hides_is_printed_as_escapes():
    assert printable("модель v1.0.gguf") == "модель v1.0.gguf"
    assert printable("a\nb\x1b[2J\u202ec\udcff") == r"a\nb\x1b[2J\u202ec\udcff"
