"""Chat templates: rendered as transformers renders them, and never at the cost of the job."""

import resource

import pytest

import bitwright.calibration.text.chat_template
from bitwright.calibration.text.chat_template import ChatTemplate, TemplateFailed
from tests.calibration.text.test_corpus import tokenizer_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ date_string }}"
    "{{ messages | tojson(indent=1) }}{{ strftime_now('%Y') }}{% endif %}"
)
CONVERSATION = [{"role": "user", "content": " Wär's <so>? "}, {"role": "assistant", "content": "漢\n"}]

# One template with many traps: each is sprung by what the user says.
TRAPS = {
    "zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "overflow": ("{{ 2.0 ** 5000 }}", "OverflowError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "text": ("{{ 'a' * 2000000000 }}", "MemoryError"),
    "list": ("{{ [0] * 1000000000 }}", "MemoryError"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
    "long": ("{{ 'a' * 20000000 }}", "it writes 20000000 characters"),
    "escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "forever": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1 seconds of computing",
    ),
}


def with_template(template):
    tokenizer = tokenizer_of(adds_begin=True)
    tokenizer.chat_template = template
    return tokenizer


def test_text_is_what_transformers_renders():
    tokenizer = with_template(CHATML)
    with ChatTemplate(tokenizer) as template:
        for variables in ({}, {"add_generation_prompt": True, "date_string": "01 Jan 2026"}):
            expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, **variables)
            assert template.render(CONVERSATION, **variables) == expected


def test_no_template_takes_more_than_it_is_given(monkeypatch):
    monkeypatch.setattr(bitwright.calibration.text.chat_template, "_SECONDS", 1.0)
    cases = "".join(f"{{% elif said == '{name}' %}}{trap}" for name, (trap, _) in TRAPS.items())
    text = "{% set said = messages[0]['content'] %}{% if said == 'hello' %}hello yourself" + cases + "{% endif %}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ChatTemplate(with_template(text)) as template:
        for name, (_, words) in TRAPS.items():
            with pytest.raises(TemplateFailed, match=words):
                template.render([{"role": "user", "content": name}])
        # A child that was ended is replaced.
        assert template.render([{"role": "user", "content": "hello"}]) == "hello yourself"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("template", ["{% if %}", "{{" + "(" * 10_000, None])
def test_a_template_that_is_none_is_named(template):
    with ChatTemplate(with_template(template)) as broken, pytest.raises(TemplateFailed):
        broken.render([])
