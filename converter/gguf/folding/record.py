"""The factors that channels are folded with, as an artifact records them: a text of a letter a channel.

The channels are those of smoothing.groups, in its order; a factor is a power of the eighth root of two, whose exponent
is the letter's distance from NONE. The text is as long for any factors, so that a plan knows its file to the byte.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from bitwright.converter.smoothing.folder import Folder
from bitwright.converter.smoothing.groups import Link, SmoothingGroup, smoothing_groups
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import ModelMap

KEY = "bitwright.folding"
"""Of the record in a GGUF."""
NONE = "O"
STEPS_PER_OCTAVE = 8
LARGEST = 46
"""What an exponent may be, up and down: letters are printable ASCII."""


def blank(groups: Sequence[SmoothingGroup]) -> str:
    """The record of factors that are all 1."""
    return NONE * sum(channels(link) for group in groups for link in group.links)


def channels(link: Link) -> int:
    return link.rows[1] - link.rows[0]


def written(exponents: np.ndarray) -> str:
    """exponents: int64 [n_channels]."""
    return (exponents + ord(NONE)).astype(np.uint8).tobytes().decode("ascii")


def factors_of(exponents: np.ndarray) -> np.ndarray:
    """float32 [n_channels], what the channels are divided by."""
    return np.exp2(exponents / STEPS_PER_OCTAVE).astype(np.float32)


def folder_of(checkpoint: Checkpoint, model_map: ModelMap, record: str, where: str) -> Folder:
    """The checkpoint folded as the record says. where: the record is, for people.

    Raises ConvertError for a record of another model, or a damaged one.
    """
    folder = Folder(checkpoint, norms="F32")
    for link, exponents in _read(smoothing_groups(checkpoint, model_map), record, where):
        if exponents.any():
            folder.fold(link, factors_of(exponents))
    return folder


def _read(groups: Sequence[SmoothingGroup], record: str, where: str) -> Iterator[tuple[Link, np.ndarray]]:
    """Every link with its exponents, int64 [n_channels]."""
    exponents = np.frombuffer(record.encode("utf-8"), np.uint8).astype(np.int64) - ord(NONE)
    links = [link for group in groups for link in group.links]
    if len(exponents) != sum(map(channels, links)) or np.abs(exponents).max(initial=0) > LARGEST:
        raise ConvertError(
            "the record of folded factors is damaged, or of another model", where, "write the artifact again"
        )
    start = 0
    for link in links:
        yield link, exponents[start : start + channels(link)]
        start += channels(link)
