"""The stage `agreement`: whether the runtime computes from the artifact what our own evaluation computes from it.

Quality and verification read the source and the artifact with the same code. What that code has wrong, and what a
runtime does otherwise than its file says, they cannot see: a sliding window that is not applied, a scale that no graph
multiplies by, text cut into other tokens, an end that is none. So the runtime is asked.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from calibration.control import ShouldStop
from calibration.corpus import load_corpus
from calibration.logits import last_logits
from converter.calibrate import load_tokenizer, runnable
from converter.checkpoint import Checkpoint
from converter.child import RuntimeFailed, RuntimeUnavailable
from converter.end_of_generation import source_end_tokens
from converter.guard import chat_texts
from converter.kept import is_kept
from converter.probe import Text, is_installed, probe
from converter.progress import Progress, size_text
from converter.target import Candidate
from converter.verdict import AGREES, DIFFERS, DISAGREES
from converter.verify import artifact_files
from formats.files import remove
from formats.regular_file import read_json
from formats.seals import write_sealed
from profiles.vocabulary import ModelMap, Role

# Text of many kinds, which every tokenizer that llama.cpp implements rightly cuts as the source does.
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 1 dog, 22 cats and 4444 or 1234567890 birds; they'll see!",
    "I'M SURE YOU'RE RIGHT, we've been told he'd go.   'tis  double   spaced, -- and (so) \"on\"...",
    "Où est passée l'élève d'à côté ? Größe, Straße, señor, ångström, Łódź, İstanbul, façade naïve.",
    "Съешь же ещё этих мягких французских булок. Η γλώσσα και το αλφάβητο. שלום עולם. مرحبا بالعالم",
    "日本語のテキストを書きます。漢字とカタカナ。中文文本处理，很好！한국어 텍스트입니다.",
    "🚀 rockets, 🦙🦙 llamas ✅ ©®™ €100 £5 → ← ∑∫ ½ ² x²+y²",
    "def encode(rows: list[int], n=10):\n    if not rows:\n\t\treturn b''\n\n\n    return rows[0] ** 2  # ok\n",
    '{"name": "x_y", "value": 3.14e-10, "path": "C:\\\\tmp\\\\a.txt", "url": "https://example.org/?q=1&r=2#top"}',
    "line\r\nline\r\n\r\n   indented\n \n  \n\t\tend   ",
    "for (int i = 0; i < 100; ++i) { sum += a[i] * b[i]; } // 0x1F, 1_000, 1e-9\nSELECT * FROM t WHERE x != 'y';",
)
# Scripts whose combining marks some expressions treat otherwise in llama.cpp's engine than in the library's.
MARKED_TEXTS = (
    "नमस्ते दुनिया, यह हिन्दी में लिखा गया है। १२३४५",
    "ไทยภาษาที่สวยงาม ๑๒๓ বাংলা ভাষা தமிழ் மொழி",
    "e\u0301te\u0301 decomposed, نَصٌّ عَرَبِيٌّ, 👩\u200d👩\u200d👧\ufe0f",
)
_SPACES = ("▁", "Ġ", " ")
QUESTION = "Why is the sky blue?"
_SPECIAL_TOKENS = 32

# Positions that are compared: the last ones of the sample, where all of a window's worth of context matters.
SCORED = 256
SAMPLE_TOKENS = 512
# Up to here a window is worth a sample of one and a half times its length.
LONGEST_WINDOW = 4096
# Between runtime and evaluation: nats, and relative error of the logits. llama.cpp rounds the inputs of its products to
# 8 bits, which costs a model of any format far less than this; what computes something else costs far more.
# transformers computes directories in 16 bits, and rounds inputs that differ in their last bits otherwise: as far from
# our evaluation as that is from the source it may come, and no further.
MOST_KLD, MOST_ERROR = 0.05, 0.25
MOST_KLD_IN_16_BITS, MOST_ERROR_IN_16_BITS = 0.5, 0.75


def runtime_agreement(
    checkpoint: Checkpoint,
    model_map: ModelMap,
    candidate: Candidate,
    work_dir: Path,
    *,
    quality: Mapping[str, Any],
    seed: int,
    device: str,
    threads: int,
    progress: Progress,
    should_stop: ShouldStop,
) -> dict[str, Any]:
    """What the runtime computes beside what the evaluation does, as plain data. Measured once: the result stays in the
    work directory.

    quality: of the artifact beside its source; the sample is of its corpus. Raises Interrupted, and RuntimeTroubled
    when the system keeps ending the runtime; then nothing is kept.
    """
    options = {"device": device, "threads": threads, "progress": progress, "should_stop": should_stop}

    result = work_dir / "agreement.json"
    if is_kept(result, "runtime agreement", progress):
        kept: dict[str, Any] = read_json(result)
        if not may_be_completed(kept):
            return kept
    running, running_map = runnable(checkpoint, model_map, work_dir)
    found = _compared(checkpoint, running, running_map, candidate, work_dir, quality, seed, options)
    write_sealed(result, "runtime agreement", json.dumps(found, indent=1).encode())
    return found


def may_be_completed(agreement: Mapping[str, Any]) -> bool:
    """Whether what was missing when the runtime was asked is there now: the runtime itself, or memory."""
    lacking = agreement["lacking"]
    if lacking is None:
        return False
    if isinstance(lacking, int):
        return lacking <= psutil.virtual_memory().available
    return is_installed(lacking)


def _compared(
    source: Checkpoint,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    candidate: Candidate,
    work_dir: Path,
    quality: Mapping[str, Any],
    seed: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """source: the model, whose tokens and ends count; checkpoint: as transformers runs it. options: device, threads,
    progress and should_stop."""
    runtime, artifact = candidate.runtime, candidate.artifact
    if artifact is None or candidate.unreadable is not None:
        return judged(runtime, unchecked=[candidate.unreadable or "there is no artifact that a runtime could load"])
    tokenizer = load_tokenizer(checkpoint.location)
    texts = [*map(Text, TEXTS), *_special_texts(tokenizer), *map(Text, MARKED_TEXTS)]
    n_tokens, unchecked, lacking = _sample_length(candidate, checkpoint, model_map)
    n_last = min(SCORED, n_tokens // 2)
    sample = _sample(quality["corpus"], tokenizer, n_tokens, seed)
    scratch = work_dir / "runtime-logits.npy"
    options["progress"]("agreement", 0, n_tokens, "tokens")
    asked = {"scratch": scratch, "threads": options["threads"], "should_stop": options["should_stop"]}
    try:
        found = probe(runtime, artifact, texts, sample, n_last, **asked)
        compared = None
        if found.logits is not None:
            own = last_logits(
                candidate.weights,
                checkpoint.location,
                np.array(sample),
                n_last,
                work_dir=work_dir / "agreement",
                arithmetic=candidate.arithmetic,
                **options,
            )
            compared = compare_logits(own, found.logits) | {"tokens": n_tokens, "scored": n_last}
        tokenized, ends = _of_source(source, checkpoint, tokenizer, texts, asked)
    except RuntimeUnavailable as error:
        return judged(runtime, unchecked=[str(error)], lacking=runtime)
    except RuntimeFailed as error:
        return judged(runtime, failed=str(error))
    finally:
        remove(scratch)
    return judged(
        found.runtime,
        texts=len(texts),
        cuts=_other_cuts(tokenizer, texts, tokenized, found.tokenized),
        ends=compare_ends(ends, found.end_tokens, model_map, tokenizer),
        logits=compared,
        limits=(MOST_KLD, MOST_ERROR) if runtime == "llama.cpp" else _limits_of_directories(quality),
        unchecked=unchecked,
        lacking=lacking,
    )


def _limits_of_directories(quality: Mapping[str, Any]) -> tuple[float, float]:
    return min(max(MOST_KLD, quality["mean_kld"] or 0), MOST_KLD_IN_16_BITS), MOST_ERROR_IN_16_BITS


def _of_source(
    source: Checkpoint, running: Checkpoint, tokenizer: Any, texts: Sequence[Text], asked: dict[str, Any]
) -> tuple[list[list[int]], frozenset[int]]:
    """The texts' tokens and the ends as the source has them: by transformers' tokenizer and the files of a checkpoint;
    a GGUF by llama.cpp, as transformers takes over neither all of its ends nor where it puts spaces."""
    if source.metadata is not None:
        of_gguf = probe("llama.cpp", source.location, texts, [], 0, **asked)
        return of_gguf.tokenized, of_gguf.end_tokens
    tokenized = [tokenizer(text.text, add_special_tokens=text.special)["input_ids"] for text in texts]
    return tokenized, source_end_tokens(running.location)


def judged(
    runtime: str,
    *,
    texts: int = 0,
    cuts: Sequence[dict[str, Any]] = (),
    ends: dict[str, Any] | None = None,
    logits: dict[str, Any] | None = None,
    limits: tuple[float, float] = (MOST_KLD, MOST_ERROR),
    unchecked: Sequence[str] = (),
    lacking: int | str | None = None,
    failed: str | None = None,
) -> dict[str, Any]:
    """The findings with their verdict, None where nothing was checked, and a sentence for each that counts against it.

    cuts, ends, logits: see _other_cuts, compare_ends and compare_logits. limits: of the divergence and of the error.
    lacking: the runtime, or the bytes of memory, that it would take to check the rest. failed: how the runtime failed.
    Without logits nothing is said to agree.
    """
    wrong: list[str] = [] if failed is None else [f"it does not run the artifact: {failed}"]
    doubtful: list[str] = []
    for known, found in ((False, wrong), (True, doubtful)):
        if of_kind := [cut for cut in cuts if cut["known"] is known]:
            where = "beside special tokens, or in scripts with combining marks" if known else "in plain text"
            found.append(
                f"it cuts {len(of_kind)} of {texts} texts into other tokens, {where}: of {_short(of_kind[0]['text'])}"
                f" {of_kind[0]['runtime']} where the source has {of_kind[0]['source']}"
            )
    if ends is not None:
        if ends["missing"]:
            text = f"it does not end at {', '.join(ends['missing'])}, where the source does"
            (wrong if ends["sayable"] else doubtful).append(text)
        if ends["ordinary"]:
            wrong.append(f"it ends at {', '.join(ends['ordinary'])}, which the source writes in any text")
    if logits is not None:
        kld, error = logits["mean_kld"], logits["relative_error"]
        most_kld, most_error = limits
        if kld is None or kld > most_kld or error > most_error:
            by = "no finite number" if kld is None else f"{kld:.3g} nats, and its logits by {error:.1%},"
            wrong.append(
                f"its predictions diverge from our evaluation of the same artifact by {by} over the last"
                f" {logits['scored']} of {logits['tokens']} tokens"
            )
    agrees = None if logits is None else DIFFERS if doubtful else AGREES
    verdict = DISAGREES if wrong else agrees
    return {
        "verdict": verdict,
        "runtime": runtime,
        "reasons": [*wrong, *doubtful],
        "texts": texts,
        "cuts": list(cuts),
        "ends": ends,
        "logits": logits,
        "unchecked": list(unchecked),
        "lacking": lacking,
    }


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _sample(held_out: str | None, tokenizer: Any, n_tokens: int, seed: int) -> list[int]:
    if not n_tokens:
        return []
    return load_corpus(held_out, tokenizer, 1, n_tokens, seed, split="test").tokens[0].tolist()


def _special_texts(tokenizer: Any) -> list[Text]:
    """A conversation by the model's own template, and special tokens between words; those alone that stand for
    themselves wherever they are."""
    rendered, _ = chat_texts(tokenizer, [QUESTION])
    texts = [Text(text, special=False) for text in rendered or ()]
    plain = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and not (token.lstrip or token.rstrip or token.single_word)
    ]
    step = max(1, len(plain) // _SPECIAL_TOKENS)
    if chosen := plain[::step][:_SPECIAL_TOKENS]:
        texts.append(Text("".join(f"word{token}and {token} more" for token in chosen), special=False))
    return texts


def _other_cuts(
    tokenizer: Any, texts: Sequence[Text], source: Sequence[list[int]], runtime: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """The texts that the runtime cuts into other tokens than the source's tokenizer. known: where llama.cpp is known to
    do so: in scripts with combining marks, and in the first word beside a special token, for the space before it."""
    cuts, special = [], set(tokenizer.added_tokens_decoder)
    for text, ours, theirs in zip(texts, source, runtime, strict=True):
        if ours == theirs:
            continue
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        known = text.text in MARKED_TEXTS
        if not text.special and not known:
            known = _later_words(tokenizer, ours, special) == _later_words(tokenizer, theirs, special)
        cuts.append(
            {
                "text": text.text,
                "known": known,
                "source": tokenizer.convert_ids_to_tokens(ours[first : first + 4]),
                "runtime": tokenizer.convert_ids_to_tokens(theirs[first : first + 4]),
            }
        )
    return cuts


def _later_words(tokenizer: Any, ids: Sequence[int], special: Collection[int]) -> list[Any]:
    """The special tokens, and between them the words behind the first one of each part, as lists of tokens; words begin
    with a space."""
    found: list[Any] = []
    n_words = 0
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if index in special:
            found.append(index)
            n_words = 0
            continue
        begins = str(token)[:1] in _SPACES
        if len(str(token)) == 1 and begins and n_words == 0:
            continue  # the space alone that one of both puts in front
        n_words += begins or n_words == 0
        if n_words > 1:
            found.append(token)
    while found and str(found[-1]) in _SPACES:
        found.pop()
    return found


def _sample_length(
    candidate: Candidate, checkpoint: Checkpoint, model_map: ModelMap
) -> tuple[int, list[str], int | None]:
    """Tokens of the sample, 0 where nothing can be run; what is not checked for that reason; and the bytes of memory
    that it would take."""
    window = sliding_window(checkpoint, model_map)
    wanted = SAMPLE_TOKENS
    if window is not None and window <= LONGEST_WINDOW:
        wanted = max(wanted, -(-3 * window // 2))
    length, unchecked = wanted, []
    context = model_map.metadata.get(f"{model_map.architecture}.context_length")
    if candidate.runtime == "llama.cpp" and context is not None and context.value < wanted:
        length = int(context.value)
        unchecked.append(f"logits beyond the {length} tokens of context that the file states")
    available = psutil.virtual_memory().available
    needed = _needed_bytes(candidate, checkpoint, model_map, length)
    if needed > available:
        free = f"{candidate.runtime} takes {size_text(needed)} of memory, and {size_text(available)} are free"
        return 0, [f"logits: {free}"], needed
    return length, unchecked, None


def _needed_bytes(candidate: Candidate, checkpoint: Checkpoint, model_map: ModelMap, n_tokens: int) -> int:
    """Memory of the runtime with the whole artifact, caches in float32, and both sides' logits."""
    assert candidate.artifact is not None
    if candidate.runtime == "llama.cpp":
        weights = sum(path.stat().st_size for path in artifact_files(candidate.artifact))
    else:  # transformers decodes every matrix as it loads it
        weights = 4 * sum(tensor.n_weights for tensor in model_map.tensors)
    width = checkpoint.config.get("hidden_size", 0)
    caches = 2 * 4 * n_tokens * width * model_map.n_layers
    vocabulary = next(t.n_rows for t in model_map.tensors if t.role is Role.EMBEDDING)
    return weights + caches + 2 * 4 * vocabulary * min(SCORED, n_tokens // 2)


def sliding_window(checkpoint: Checkpoint, model_map: ModelMap) -> int | None:
    """Tokens that the layers with a window attend to; None where there is none."""
    stated = model_map.metadata.get(f"{model_map.architecture}.attention.sliding_window")
    if stated is not None:
        return int(stated.value)
    config = checkpoint.config
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


def compare_ends(
    source: frozenset[int], runtime: frozenset[int], model_map: ModelMap, tokenizer: Any
) -> dict[str, Any]:
    """Tokens that end a generation, as texts. missing: in the source's set alone; sayable: the file had a key left to
    say them by. ordinary: ends of the runtime alone that are no special tokens; special: those that are."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    keys = ("eos", "eot", "eom")

    def texts(ids: Iterable[int]) -> list[str]:
        return [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids))]

    extra = runtime - source
    return {
        "missing": texts(source - runtime),
        "sayable": any(f"tokenizer.ggml.{key}_token_id" not in model_map.metadata for key in keys),
        "ordinary": texts(extra - special),
        "special": texts(extra & special),
    }


def compare_logits(own: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """KL divergence of the runtime from the evaluation over positions, in nats; the relative error of its logits, each
    position's mean taken off, which sees what a saturated distribution hides; and agreement of the top token.

    own, theirs: float32 [n, vocabulary]. Divergences and error are None where predictions are not finite.
    """
    divergences, squares, agreed = [], np.zeros(2), 0
    for p, q in zip(own, theirs, strict=True):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        divergences.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        centred = log_p - log_p.mean()
        squares += [np.square(log_q - log_q.mean() - centred).sum(), np.square(centred).sum()]
        agreed += int(p.argmax() == q.argmax())
    finite = bool(np.isfinite(divergences).all() and np.isfinite(squares).all())
    return {
        "mean_kld": float(np.mean(divergences)) if finite else None,
        "max_kld": float(np.max(divergences)) if finite else None,
        "relative_error": float(np.sqrt(squares[0] / max(squares[1], 1e-300))) if finite else None,
        "top1_agreement": agreed / len(own),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
