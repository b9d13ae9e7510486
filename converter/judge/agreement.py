"""The stage `agreement`: whether the runtime computes from the artifact what our own evaluation computes from it.

Quality and verification read the source and the artifact with the same code. What that code has wrong, and what a
runtime does otherwise than its file says, they cannot see: a sliding window that is not applied, a scale that no graph
multiplies by, text cut into other tokens, an end that is none. So the runtime is asked.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bitwright.calibration.evaluation.logits import stream_last_logits
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.grades import AGREES, DIFFERS, DISAGREES
from bitwright.converter.gguf.verify import artifact_files
from bitwright.converter.job.kept import kept_json
from bitwright.converter.judge.child import Runtime, RuntimeFailed, RuntimeUnavailable, is_installed
from bitwright.converter.judge.guard import chat_texts
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.probe import Probe, Text, probe
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.tokenizer.end_of_generation import source_end_tokens
from bitwright.formats.files.disk import remove
from bitwright.formats.files.seals import is_sound
from bitwright.profiles.sizes import size_text
from bitwright.profiles.vocabulary import ModelMap, Role

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

# Positions that are compared: the last ones of the sample, where all of a window's worth of context matters. Of these
# the very last is not scored, as in quality.
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


def runtime_agreement(judging: Judging, candidate: Candidate, quality: Mapping[str, Any]) -> dict[str, Any]:
    """What the runtime computes beside what the evaluation does, as plain data. Measured once: the result stays in the
    work directory.

    quality: of the artifact beside its source; the sample is of the same corpus. Raises Interrupted, and
    RuntimeTroubled when the system keeps ending the runtime; then nothing is kept.
    """

    def compute() -> dict[str, Any]:
        return _findings(judging, candidate, quality).to_dict()

    def is_complete(agreement: dict[str, Any]) -> bool:
        return not may_be_completed(agreement)

    result = judging.work_dir / "agreement.json"
    agreement = kept_json(result, "runtime agreement", judging.progress, compute, answers=is_complete)
    remove(judging.candidate_logits)
    return agreement


def may_be_completed(agreement: Mapping[str, Any]) -> bool:
    """Whether what was missing when the runtime was asked is there now: the runtime itself, or memory."""
    lacking = agreement["lacking"]
    if lacking is None:
        return False
    if isinstance(lacking, int):
        return bool(lacking <= psutil.virtual_memory().available)
    return is_installed(lacking)


@dataclass(frozen=True)
class Findings:
    """What is known of a runtime with an artifact. runtime: its name, with its version where it was asked.

    texts: how many were cut. cuts, ends, logits: see other_cuts, compare_ends and compare_logits. limits: of the
    divergence and of the error. unchecked: what was not looked at, and why. lacking: the runtime, or the bytes of
    memory, that it would take to check the rest. failed: how the runtime failed.
    """

    runtime: str
    texts: int = 0
    cuts: Sequence[dict[str, Any]] = ()
    ends: dict[str, Any] | None = None
    logits: dict[str, Any] | None = None
    limits: tuple[float, float] = (MOST_KLD, MOST_ERROR)
    unchecked: Sequence[str] = ()
    lacking: int | str | None = None
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the verdict, None where nothing was checked, and a sentence for each finding that counts
        against the runtime. Without logits nothing is said to agree."""
        missing = self._missing_ends()
        sayable = self.ends is not None and self.ends["sayable"]
        failed = [] if self.failed is None else [f"it does not run the artifact: {self.failed}"]
        wrong = [
            *failed,
            *self._cuts_that_are(known=False),
            *(missing if sayable else ()),
            *self._ordinary_ends(),
            *self._divergence(),
        ]
        doubtful = [*self._cuts_that_are(known=True), *(() if sayable else missing)]
        agrees = None if self.logits is None else DIFFERS if doubtful else AGREES
        return {
            "verdict": DISAGREES if wrong else agrees,
            "runtime": self.runtime,
            "reasons": [*wrong, *doubtful],
            "texts": self.texts,
            "cuts": list(self.cuts),
            "ends": self.ends,
            "logits": self.logits,
            "unchecked": list(self.unchecked),
            "lacking": self.lacking,
        }

    def _cuts_that_are(self, known: bool) -> Iterator[str]:
        if cuts := [cut for cut in self.cuts if cut["known"] is known]:
            where = "beside special tokens, or in scripts with combining marks" if known else "in plain text"
            yield (
                f"it cuts {len(cuts)} of {self.texts} texts into other tokens, {where}: of {_short(cuts[0]['text'])}"
                f" {cuts[0]['runtime']} where the source has {cuts[0]['source']}"
            )

    def _missing_ends(self) -> list[str]:
        if self.ends is None or not self.ends["missing"]:
            return []
        return [f"it does not end at {', '.join(self.ends['missing'])}, where the source does"]

    def _ordinary_ends(self) -> Iterator[str]:
        if self.ends is not None and self.ends["ordinary"]:
            yield f"it ends at {', '.join(self.ends['ordinary'])}, which the source writes in any text"

    def _divergence(self) -> Iterator[str]:
        if self.logits is None:
            return
        kld, error = self.logits["mean_kld"], self.logits["relative_error"]
        most_kld, most_error = self.limits
        if kld is None or kld > most_kld or error > most_error:
            by = "no finite number" if kld is None else f"{kld:.3g} nats, and its logits by {error:.1%},"
            yield (
                f"its predictions diverge from our evaluation of the same artifact by {by} over the last"
                f" {self.logits['scored']} of {self.logits['tokens']} tokens"
            )


def _findings(judging: Judging, candidate: Candidate, quality: Mapping[str, Any]) -> Findings:
    runtime, artifact = candidate.runtime, candidate.artifact
    if artifact is None or candidate.unreadable is not None:
        unchecked = candidate.unreadable or "there is no artifact that a runtime could load"
        return Findings(runtime, unchecked=[unchecked])
    running, running_map = judging.running
    tokenizer = judging.tokenizer
    texts = [*map(Text, TEXTS), *_special_texts(tokenizer), *map(Text, MARKED_TEXTS)]
    n_tokens, unchecked_logits, lacking = _sample_length(artifact, runtime, running, running_map)
    n_last = min(SCORED, n_tokens // 2)
    in_quality = n_tokens == judging.sequence_length  # then its first sample serves here, too
    sample = []
    if n_tokens:
        n_samples = judging.samples if in_quality else 1
        sample = judging.held_out(judging.text or quality["corpus"], n_samples, n_tokens).tokens[0].tolist()
    scratch = judging.work_dir / "runtime-logits.npy"
    ask = partial(probe, scratch=scratch, threads=judging.threads, should_stop=judging.should_stop)
    judging.progress("agreement", 0, n_tokens, "tokens")
    try:
        tokenized, ends = _tokens_of_source(judging, texts, ask)
    except (RuntimeUnavailable, RuntimeFailed) as error:
        lacking_runtime = "llama.cpp" if isinstance(error, RuntimeUnavailable) else None
        return Findings(runtime, unchecked=[f"the source is a GGUF: {error}"], lacking=lacking_runtime)
    try:
        answer = ask(runtime, artifact, texts, sample, n_last)
        compared = None
        if answer.logits is not None:
            evaluated = _evaluated(judging, candidate, sample, n_last, in_quality)
            compared = compare_logits(evaluated, answer.logits[:-1]) | {"tokens": n_tokens, "scored": n_last - 1}
    except RuntimeUnavailable as error:
        return Findings(runtime, unchecked=[str(error)], lacking=runtime)
    except RuntimeFailed as error:
        return Findings(runtime, failed=str(error))
    finally:
        remove(scratch)
    return Findings(
        answer.runtime,
        texts=len(texts),
        cuts=other_cuts(tokenizer, texts, tokenized, answer.tokenized),
        ends=compare_ends(ends, answer.end_tokens, running_map, tokenizer),
        logits=compared,
        limits=(MOST_KLD, MOST_ERROR) if runtime == "llama.cpp" else _limits_of_directories(quality),
        unchecked=unchecked_logits,
        lacking=lacking,
    )


def _evaluated(
    judging: Judging, candidate: Candidate, sample: Sequence[int], n_last: int, in_quality: bool
) -> np.ndarray:
    """Our logits of the artifact after each of the sample's last n_last tokens but the last: float32 [n_last - 1,
    vocabulary], those that quality has left where the sample is the first one of its text."""
    if in_quality and is_sound(judging.candidate_logits):
        left: np.ndarray = np.load(judging.candidate_logits, mmap_mode="r")
        if len(left) == n_last - 1:
            return left
    model = judging.candidate_model(candidate)
    return stream_last_logits(model, np.array(sample), n_last, judging.control("agreement"))[:-1]


def _limits_of_directories(quality: Mapping[str, Any]) -> tuple[float, float]:
    return min(max(MOST_KLD, quality["mean_kld"] or 0), MOST_KLD_IN_16_BITS), MOST_ERROR_IN_16_BITS


def _tokens_of_source(
    judging: Judging, texts: Sequence[Text], ask: Callable[..., Probe]
) -> tuple[list[list[int]], frozenset[int]]:
    """The texts' tokens and the ends as the source has them: by transformers' tokenizer and the files of a checkpoint;
    a GGUF by llama.cpp, as transformers takes over neither all of its ends nor where it puts spaces."""
    source = judging.checkpoint
    if source.metadata is not None:
        answer = ask("llama.cpp", source.location, texts, [], 0)
        return answer.tokenized, answer.end_tokens
    tokenizer = judging.tokenizer
    tokenized = [tokenizer(text.text, add_special_tokens=text.special)["input_ids"] for text in texts]
    return tokenized, source_end_tokens(source.location)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


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


def other_cuts(
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
    later: list[Any] = []
    n_words = 0
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if index in special:
            later.append(index)
            n_words = 0
            continue
        begins = str(token)[:1] in _SPACES
        if len(str(token)) == 1 and begins and n_words == 0:
            continue  # the space alone that one of both puts in front
        n_words += begins or n_words == 0
        if n_words > 1:
            later.append(token)
    while later and str(later[-1]) in _SPACES:
        later.pop()
    return later


def _sample_length(
    artifact: Path, runtime: Runtime, checkpoint: Checkpoint, model_map: ModelMap
) -> tuple[int, list[str], int | None]:
    """Tokens of the sample, 0 where nothing can be run; what is not checked for that reason; and the bytes of memory
    that it would take. checkpoint, model_map: as transformers runs the source."""
    window = sliding_window(checkpoint, model_map)
    wanted = SAMPLE_TOKENS
    if window is not None and window <= LONGEST_WINDOW:
        wanted = max(wanted, -(-3 * window // 2))
    length, unchecked = wanted, []
    context = model_map.metadata.get(f"{model_map.architecture}.context_length")
    if runtime == "llama.cpp" and context is not None and context.value < wanted:
        length = int(context.value)
        unchecked.append(f"logits beyond the {length} tokens of context that the file states")
    available = psutil.virtual_memory().available
    needed = _needed_bytes(artifact, runtime, checkpoint, model_map, length)
    if needed > available:
        free = f"{runtime} takes {size_text(needed)} of memory, and {size_text(available)} are free"
        return 0, [f"logits: {free}"], needed
    return length, unchecked, None


def _needed_bytes(artifact: Path, runtime: Runtime, checkpoint: Checkpoint, model_map: ModelMap, n_tokens: int) -> int:
    """Memory of the runtime with the whole artifact, caches in float32, and both sides' logits."""
    if runtime == "llama.cpp":
        weights = sum(path.stat().st_size for path in artifact_files(artifact))
    else:  # transformers decodes every matrix as it loads it
        weights = 4 * sum(tensor.n_weights for tensor in model_map.tensors)
    width = checkpoint.config.get("hidden_size", 0)
    caches = 2 * 4 * n_tokens * width * model_map.n_layers
    vocabulary = next(t.n_rows for t in model_map.tensors if t.role is Role.EMBEDDING)
    return int(weights + caches + 2 * 4 * vocabulary * min(SCORED, n_tokens // 2))


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


def compare_logits(evaluated: np.ndarray, runtime: np.ndarray) -> dict[str, Any]:
    """KL divergence of the runtime from the evaluation over positions, in nats; the relative error of its logits, each
    position's mean taken off, which sees what a saturated distribution hides; and agreement of the top token.

    evaluated, runtime: float32 [n, vocabulary]. Divergences and error are None where predictions are not finite.
    """
    divergences, squares, agreed = [], np.zeros(2), 0
    for p, q in zip(evaluated, runtime, strict=True):
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
        "top1_agreement": agreed / len(evaluated),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return normalised
