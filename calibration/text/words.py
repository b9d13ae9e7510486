"""Which tokens of a text are whole words, for the question whether a model finds the next one.

A word begins with a token that carries a space and letters (" the", in the vocabulary "Ġthe" or "▁the"), or with one of
a space alone, and goes on over tokens of letters alone. Writing without spaces has no such words, and numbers,
punctuation and code that is not of letters are none.
"""

from typing import Any

import numpy as np

NO_WORD = -1
_SPACES = ("Ġ", "▁", " ")
_OTHER, _BEGINS, _CONTINUES, _SPACE = range(4)


def word_numbers(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """int32 [n_samples, sequence_length]: the number of the word that each token is part of, NO_WORD outside of words.

    tokens: int [n_samples, sequence_length]; numbers count through all samples. A word that the sample's end may have
    cut is none. tokenizer: transformers'.
    """
    ids, places = np.unique(tokens, return_inverse=True)
    kinds = np.array([_kind(token, tokenizer) for token in tokenizer.convert_ids_to_tokens(ids.tolist())])
    kinds = kinds[places].reshape(tokens.shape)
    numbers = np.full(tokens.shape, NO_WORD, np.int32)
    count = 0
    for sample, row in zip(kinds, numbers, strict=True):
        for start in np.flatnonzero((sample == _BEGINS) | (sample == _SPACE)):
            ends = np.flatnonzero(sample[start + 1 :] != _CONTINUES)
            if len(ends) and (ends[0] > 0 or sample[start] == _BEGINS):
                row[start : start + 1 + ends[0]] = count
                count += 1
    return numbers


def _kind(token: str | None, tokenizer: Any) -> int:
    if not token:
        return _OTHER
    spaced = token.startswith(_SPACES)
    text = tokenizer.convert_tokens_to_string([token[1:] if spaced else token])
    if not text.isalpha():
        return _SPACE if spaced and not text else _OTHER
    return _BEGINS if spaced else _CONTINUES


def word_accuracy(numbers: np.ndarray, hits: np.ndarray) -> tuple[int, float | None]:
    """(words, the share of them whose every token was the most probable one; None without words).

    numbers: int [n_samples, n_positions] of the scored tokens, words that begin before them left out.
    hits: of the same shape, whether the token was found.
    """
    inside = numbers != NO_WORD
    if not inside.any():
        return 0, None
    _, word = np.unique(numbers[inside], return_inverse=True)
    missed = np.bincount(word, weights=~hits[inside].astype(bool))
    return len(missed), float((missed == 0).mean())
