"""Packing: where samples begin, chat templates, and what a conversation looks like to the model."""

from itertools import pairwise

import numpy as np
import pytest

from bitwright.calibration.text.corpus import load_corpus
from bitwright.calibration.text.packing import Document, documents, pack
from bitwright.formats.errors import ConvertError
from tests.calibration.text.test_corpus import BEGIN, hub_of, tokenizer_of

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
PASSAGE = "The first sentence opens the passage at some length. Then it goes on! And on? It ends here."


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizer_of(adds_begin=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(tokenizer, document: Document) -> list[str]:
    bounds = [*document.starts, len(document.tokens)]
    return [tokenizer.decode(document.tokens[a:b]) for a, b in pairwise(bounds)]


def test_sentences_and_lines_begin_where_a_reader_sees_them(tokenizer):
    passage = 'He said "no." She left.\n\n  A heading\nVersion 1.5 is 3.2x faster. 終わり。次'
    (document,) = documents([passage], tokenizer, chat=False)
    assert texts(tokenizer, document) == [
        'He said "no." ',
        "She left.\n\n  ",
        "A heading\n",
        "Version 1.5 is 3.2x faster. ",
        "終わり。",
        "次",
    ]


def test_every_other_passage_becomes_a_conversation(tokenizer):
    plain, chat = documents([PASSAGE, PASSAGE], tokenizer, chat=True)
    assert plain.text == PASSAGE
    assert chat.text == (
        "[user]The first sentence opens the passage at some length.[end]"
        "[assistant]Then it goes on! And on? It ends here.[end]"
    )
    assert tokenizer.decode(chat.tokens) == chat.text


def test_passage_of_one_sentence_stays_as_it_is(tokenizer):
    _, document = documents(["", "Nothing follows this only sentence of the passage."], tokenizer, chat=True)
    assert "[user]" not in document.text


def test_conversations_of_a_dataset_are_rendered_whole(monkeypatch, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
    ]
    monkeypatch.setattr("bitwright.calibration.text.corpus.resolve_corpus", lambda name: (name, "as asked"))
    for row in rows:
        hub_of(monkeypatch, [row] * 4, ["train"])
        corpus = load_corpus("org/name", tokenizer, samples=2, sequence_length=38, chat=True)
        assert corpus.name == "org/name (chat template)"
        assert tokenizer.decode(corpus.tokens[0, 1:]) == "[user]Hello?[end][assistant]Yes.[end]"
        plain = load_corpus("org/name", tokenizer, samples=1, sequence_length=13, chat=False)
        assert tokenizer.decode(plain.tokens[0, 1:]) == "Hello?\n\nYes."[:12]


def test_template_that_writes_the_first_token_does_not_double_it():
    tokenizer = tokenizer_of(adds_begin=True)
    tokenizer.chat_template = "<s>" + TEMPLATE
    _, document = documents([PASSAGE, PASSAGE], tokenizer, chat=True)
    assert BEGIN not in document.tokens


def test_template_that_cannot_be_rendered_is_named():
    tokenizer = tokenizer_of(adds_begin=False)
    tokenizer.chat_template = "{{ raise_exception('no assistant here') }}"
    with pytest.raises(ConvertError, match="no assistant here") as caught:
        list(documents([PASSAGE, PASSAGE], tokenizer, chat=True))
    assert "--no-chat" in caught.value.remedy


def made_of(*lengths: int) -> Document:
    starts = np.cumsum([0, *lengths])
    return Document("", list(range(starts[-1])), starts[:-1].tolist())


def test_sentence_cut_by_a_sample_begins_the_next_one():
    np.testing.assert_array_equal(pack([made_of(4, 4, 4, 4)], 6, None), [range(6), range(4, 10), range(8, 14)])


def test_sentence_longer_than_half_a_sample_is_cut():
    np.testing.assert_array_equal(pack([made_of(2, 20)], 6, None), [range(6), range(6, 12), range(12, 18)])


def test_samples_run_over_documents():
    packed = pack([made_of(3), made_of(3), made_of(3)], 5, begin=99)
    np.testing.assert_array_equal(packed, [[99, 0, 1, 2, 0], [99, 0, 1, 2, 0]])
