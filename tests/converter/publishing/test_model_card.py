"""The card's text: what it says of a loss, what it leaves of a person's words, what cannot be smuggled into it."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from bitwright.converter.publishing.card import BEGIN, END, front_matter, section, write_card
from bitwright.converter.report.data import PublishedReport
from bitwright.formats.errors import ConvertError
from tests.converter.report.reports import COHERENCE, DIVERGENT, QUALITY, answer, report


def text_of(*reports: PublishedReport, base_model: str | None = "Org/Tiny") -> str:
    return section("me/Tiny-GGUF", base_model, reports, chat_template=True)


def test_the_figures_of_a_report():
    text = text_of(report())
    for fact in (
        "| [Tiny-1B.gguf](Tiny-1B.gguf) | fair | balanced-4bit | 1000 B | 4.50 | 4.00x | 12.500 (source 10.000) |",
        "| mlp | Q4_K (2) | 0.0 M | 900 B | 4.50 | 100.0% |",
        "| 99.9 % of tokens are below | 1.2500 |",
        "in 12.5% of places its most likely token is not the source's; perplexity changes by +25.0%",
        "bitwright --profile balanced-4bit --calibration wikitext-2 --samples 512 Org/Tiny@01",
        "bitwright --profile recipe/Tiny-1B/balanced-4bit.toml --imatrix Tiny.imatrix.gguf Org/Tiny@01",
        "1.00% of its energy (blk.0.ffn_up.weight, Q4_K)",
        "llama-server -hf me/Tiny-GGUF:1B\n",
        "Measured on 4096 tokens of wikitext-2 alone",
    ):
        assert fact in text, fact
    assert "WARNING" not in text and "not measured" not in text


LOOPING = replace(COHERENCE, verdict="failed", prompts=(answer("loop", text="<SSSS>"),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quality": replace(QUALITY, mean_kld=0.5)}, ["is damaged: it should not", "mean KL divergence 0.500"]),
        ({"quality": replace(QUALITY, mean_kld=0.3)}, ["is lossy: it works", "perplexity 10.00 -> 12.50"]),
        ({"quality": DIVERGENT}, ["is damaged", "not finite in 7 of 4096 places", "-> not finite"]),
        (
            {"coherence": LOOPING},
            ["is damaged", "it no longer writes text", "1 of 1 answers do not hold together (loop)", "'&lt;SSSS>'"],
        ),
    ],
)
def test_a_severe_loss_is_said_before_anything_else(changes, words):
    text = text_of(report(), report("Tiny-1B-Q1", 500, **changes))
    warning = text.split("\n\n")[1]
    assert warning.startswith("> [!WARNING]") and "Tiny-1B-Q1.gguf" in warning
    assert all(word in warning for word in words), warning
    assert text.count("WARNING") == 1


def test_what_was_not_measured_is_not_claimed():
    text = text_of(report(quality=None, coherence=None, calibration=None))
    assert text.count("not measured") == 5 and "Nothing was measured of Tiny-1B.gguf" in text
    assert "KL divergence compares" not in text and "perplexity changes" not in text
    assert "No importance matrix was used" in text


def test_artifacts_in_the_order_of_their_size_whatever_comes_first():
    small, large = report("Tiny-1B-Q2", 500), report("Tiny-1B", 1000)
    assert text_of(small, large) == text_of(large, small)
    assert text_of(large, small).index("## Tiny-1B-Q2") < text_of(large, small).index("## Tiny-1B\n")


def test_names_are_words_and_no_markup():
    evil = "x|y <img src=a> `z` [a](b)\n# Title " + END
    card = write_card(None, {}, text_of(report(model=evil, profile=evil, tool=evil), base_model=None), "here")
    assert card.count(END) == 1 and "<img" not in card and not re.search(r"^# Title", card, re.MULTILINE)
    rows = [line for line in card.splitlines() if line.startswith("| [Tiny")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 10 for row in rows[:1])


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("__bold__ ~~gone~~ _a_ b_", r"\_\_bold\_\_ \~\~gone\~\~ \_a\_ b\_"),
        ("see http://evil.example", "see http&#58;//evil.example"),
        ("_www.evil.example FTP://evil.example", r"\_www&#46;evil.example FTP&#58;//evil.example"),
        ("WWW.evil.example", "WWW&#46;evil.example"),
        ("# Title", r"\# Title"),
        ("> words", r"\> words"),
        ("Q4_K_M-v1.0 2:4 (a) 1.5%", "Q4_K_M-v1.0 2:4 (a) 1.5%"),
    ],
)
def test_a_name_is_shown_letter_by_letter(name, written):
    groups = (replace(report().groups[0], group=name),)
    assert f"\n| {written} | Q4_K (2) |" in text_of(report(groups=groups))


def test_nothing_ends_a_block_of_commands_or_leads_elsewhere():
    evil = "Org/x\n````\n# Title ](javascript:alert(1)) <b> " + END
    changed = report("a b](http://evil.example) ```", arguments=("--profile=p", evil), model=evil)
    changed = replace(changed, quality=replace(QUALITY, corpus="[x](http://evil.example)"))
    card = write_card(None, {}, text_of(changed, base_model="Org/T](http://evil.example)"), "here")
    assert card.count(END) == 1 and "<b>" not in re.sub(r"(`{3,})sh\n.*?\n\1", "", card, flags=re.DOTALL)
    outside, fence = [], None
    for line in card.splitlines():  # as CommonMark reads it: a fence ends with one that is no shorter
        ticks = re.fullmatch(r"(`{3,})(sh)?", line)
        if ticks and fence is None:
            fence = ticks[1]
        elif ticks and not ticks[2] and len(ticks[1]) >= len(fence):
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None and "# Title ](javascript:alert(1)) <b> " not in outside
    assert "](http://evil" not in re.sub(r"\\[\[\]]", "", "\n".join(outside))
    assert "](https://huggingface.co/Org/T%5D%28http%3A//evil.example%29)" in card


def test_the_front_matter_takes_over_what_holds_for_a_quantization():
    source = {
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.org/license",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["chat", "safetensors", "base_model:a/b", "text-generation", "region:us"],
        "base_model": "Org/Ancestor",
        "datasets": ["a/b"],
    }
    assert front_matter(None, {"tags": [["chat"]], "language": {"a": "en"}}, "me", calibrated=False)["tags"] == [
        "gguf",
        "bitwright",
    ]
    assert front_matter("Org/Tiny", source, "me", calibrated=False) == {
        "base_model": "Org/Tiny",
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "library_name": "gguf",
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.org/license",
        "pipeline_tag": "text-generation",
        "language": ["en", "de"],
        "tags": ["gguf", "bitwright", "chat"],
    }
    assert "base_model" not in front_matter(None, {}, "me", calibrated=True)


ENTRIES = {"base_model": "Org/Tiny", "license": "mit", "tags": ["gguf", "bitwright"]}


def entries_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(re.match(r"---\r?\n(.*?)^---", card, re.DOTALL | re.MULTILINE)[1])


def test_the_same_again_is_the_same():
    card = write_card(None, ENTRIES, "words", "here")
    assert write_card(card, ENTRIES, "words", "here") == card
    assert entries_of(card) == ENTRIES


@pytest.mark.parametrize(
    "existing",
    [
        "",
        "My own card.\n",
        "---\nlicense: apache-2.0 # as agreed\nbase_model: org/tiny\n---\n# Mine\n\nText --- with\n---\nlines.\n",
        "---\r\nlicense: mit\r\n---\r\nWindows\r\n",
        "---\n---\nempty\n",
        f"before\n\n{BEGIN}\nold words\n{END}\n\nafter\n",
        f"---\nextra: [1, 2]\n---\n{BEGIN}{END}",
    ],
)
def test_a_persons_words_stay(existing):
    card = write_card(existing, ENTRIES, "new words", "here")
    body = re.sub(r"\A---.*?^---\r?\n", "", existing, flags=re.DOTALL | re.MULTILINE)
    for words in re.split(rf"{re.escape(BEGIN)}.*{re.escape(END)}", body, flags=re.DOTALL):
        assert words.strip() in card
    assert "old words" not in card and card.count("new words") == 1
    assert entries_of(card)["base_model"] == "Org/Tiny"
    assert entries_of(card)["license"] == ("apache-2.0" if "apache" in existing else "mit")
    assert entries_of(card).get("extra") == ([1, 2] if "extra" in existing else None)
    assert write_card(card, ENTRIES, "new words", "here") == card


def test_front_matter_that_says_it_all_keeps_its_letters():
    existing = "---\n# a comment\nlicense: mit\nbase_model: [a/b, Org/Tiny]\ntags: [bitwright, gguf, x]\n---\nwords\n"
    assert write_card(existing, ENTRIES, "new", "here").startswith(existing.removesuffix("words\n"))


@pytest.mark.parametrize("existing", [f"{BEGIN}\nx", f"x\n{END}", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_marks_that_are_no_pair(existing):
    with pytest.raises(ConvertError, match="not one pair"):
        write_card(existing, ENTRIES, "words", "here")


@pytest.mark.parametrize(
    "front", ["a: [", "- a\n- b", "just words", "a: !!python/object:os.system {}", "a: &a 1\nb: *a", "a: 2024-13-45"]
)
def test_front_matter_that_makes_no_sense(front):
    with pytest.raises(ConvertError, match="front matter"):
        write_card(f"---\n{front}\n---\nbody\n", ENTRIES, "words", "here")
