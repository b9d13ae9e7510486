"""Words of a text by its tokens, and how many of them a model finds."""

import numpy as np
import pytest
import transformers

from bitwright.calibration.text.words import NO_WORD, word_accuracy, word_numbers


class Tokenizer:
    """Tokens that are their own strings."""

    def __init__(self, words: list[str]):
        self.words = words

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def numbers(*samples: str) -> list[list[int]]:
    words = sorted({token for sample in samples for token in sample.split("|")})
    tokens = np.array([[words.index(token) for token in sample.split("|")] for sample in samples])
    return word_numbers(tokens, Tokenizer(words)).tolist()


def test_words_begin_with_a_space_and_go_on_over_letters():
    assert numbers("A|Ġcat|ch|er|,|Ġno|t|12|Ġ3|Ġend") == [[-1, 0, 0, 0, -1, 1, 1, -1, -1, -1]]
    assert numbers("▁one|▁two|!", "▁three|x|.") == [[0, 1, -1], [2, 2, -1]]
    assert numbers("Ġ|Ġ(|a|b|Ċ") == [[-1] * 5]
    assert numbers("▁|h|i|▁|1|▁|.|▁|x") == [[0, 0, 0, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_real_tokenizers_words_are_those_of_the_text(name, tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny(name))
    text = "The quick brown fox, 12 of them; jumps over-night. Öl und Äpfel!"
    tokens = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = word_numbers(tokens, tokenizer)[0]
    words = [tokenizer.decode(tokens[0][found == i]).strip() for i in range(found.max() + 1)]
    expected = ["quick", "brown", "fox", "of", "them", "jumps", "over", "Öl", "und", "Äpfel"]
    assert words == (expected if name == "llama" else ["The", *expected])


def test_a_word_counts_when_all_of_it_is_found():
    numbers = np.array([[0, 0, NO_WORD, 1], [2, 3, 3, NO_WORD]])
    hits = np.array([[1, 0, 0, 1], [1, 1, 1, 0]], dtype=float)
    assert word_accuracy(numbers, hits) == (4, 0.75)
    assert word_accuracy(np.full((1, 3), NO_WORD), np.ones((1, 3))) == (0, None)
