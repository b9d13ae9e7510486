"""`bitwright evaluate --part` and `--merge`: an artifact's quality, measured by machines that share the text.

safetensors   metadata "bitwright.scores": JSON with "version", the part, the fingerprint, the text's identity, the
              words of the command, and the SHA-256 of the arrays
              "scores"   float64 [6, n_positions], what Baseline.stream_scores tells of the part's samples
              "tokens"   int32 [n_samples, sequence_length]
              "words"    int32, of each token the number of its word in the whole text, see calibration/text/words.py
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.control import ShouldStop
from bitwright.calibration.text.corpus import Corpus
from bitwright.calibration.text.words import word_numbers
from bitwright.converter.job.cache import arrays_identity, machine_identity, text_identity
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.progress import Progress
from bitwright.converter.judge.open import candidate_of, judging_of
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.unlike import gathered
from bitwright.converter.machines.work import part_directory, work_path
from bitwright.converter.source.checkpoint import places_identity
from bitwright.converter.source.open import open_by_content
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.files.record import RecordKind
from bitwright.formats.typed import to_plain

_KIND = RecordKind("bitwright.scores", 1, "part of an evaluation", "bitwright evaluate --part")
_FIELDS: dict[str, tuple[type, ...]] = {
    "part": (list,),
    "fingerprint": (dict,),
    "corpus": (str,),
    "corpus_sha256": (str,),
    "command": (list,),
    "sha256": (str,),
}


@dataclass(frozen=True, eq=False)
class _Scores:
    part: Part
    fingerprint: dict[str, Any]
    corpus: str
    corpus_sha256: str
    command: list[str]
    arrays: dict[str, np.ndarray]


def write_scores(
    artifact: Path,
    model: str,
    part: Part,
    output: Path,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    words: Sequence[str],
    scratch: Path | None = None,
    **how: Any,
) -> Path:
    """Measure an artifact on the samples of a part; returns the file, which is written last.

    words: of the command. scratch: where the hidden states are, on a disk of this machine; None for beside the output.
    how: text, samples, sequence_length, threads and device, as of judge.open.evaluate_artifact. Raises ConvertError
    (Stopped when should_stop() asked for it); the same call continues after the last layer.
    """
    from bitwright.calibration.evaluation.quality import stream_excerpt_scores
    from bitwright.calibration.stream.micro_batches import N_GROUPS, Excerpt, groups_of_part

    if part.count > min(N_GROUPS, how["samples"]):
        raise ConvertError(
            f"{how['samples']} samples in {N_GROUPS} groups cannot be cut into {part.count} parts",
            f"--part {part}",
            f"take {min(N_GROUPS, how['samples'])} parts at most",
        )
    checkpoint = open_by_content(model, from_quantized=True)
    files = sorted(artifact.glob("*.safetensors")) if artifact.is_dir() else [artifact]
    fingerprint = to_plain(
        {
            "tool": tool_identity(),
            "artifact": [[path.name, path.stat().st_size, places_identity(path)] for path in files],
            "model": checkpoint.model_id,
            "files": checkpoint.files(),
            **{key: how[key] for key in ("samples", "sequence_length")},
            **machine_identity(how["device"]),
        }
    )
    if output.exists():
        made = _load(output)
        found_out = {key: made.fingerprint.get(key) for key in ("text", "computed")}
        if made.part == part and made.fingerprint == fingerprint | found_out:
            progress.say(f"{output}: already done")
            remove_tree(work_path(output, scratch))
            return output
    begun = {**fingerprint, "part": str(part)}
    with part_directory(output, scratch, begun, progress, shlex.join(words)) as directory:
        judging = judging_of(artifact, checkpoint, directory, progress, should_stop, cache=Path("off"), **how)
        candidate = candidate_of(artifact, judging)
        corpus = judging.held_out(judging.text, judging.samples, judging.sequence_length)
        excerpt = Excerpt.of_groups(groups_of_part(part.index, part.count), len(corpus.tokens))
        scores, computed = stream_excerpt_scores(
            judging.source_model, candidate.weights, corpus, judging.control("quality"), excerpt, candidate.arithmetic
        )
        own = slice(excerpt.first, excerpt.first + excerpt.n_samples)
        arrays = {
            "scores": scores,
            "tokens": np.ascontiguousarray(corpus.tokens[own]),
            "words": np.ascontiguousarray(word_numbers(corpus.tokens, judging.tokenizer)[own]),
        }
        header = {
            "part": [part.index, part.count],
            "fingerprint": fingerprint | {"text": text_identity(corpus), "computed": computed},
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            "command": list(words),
            "sha256": arrays_identity(arrays),
        }
        _KIND.save(output, header, arrays)
    return output


def merge_scores(paths: Sequence[Path]) -> dict[str, Any]:
    """The quality of which the parts have a share each, as evaluate_artifact gives it; what the runtime computes is not
    asked, and "agreement" is None. Raises ConvertError for parts that are missing, damaged or do not go together."""
    from bitwright.calibration.evaluation.quality import quality_of

    parts = gathered(paths, _load, "what `bitwright evaluate --part I/N`")
    known, arrays_of_parts = parts[0], [part.arrays for part in parts]
    scores = np.concatenate([arrays["scores"] for arrays in arrays_of_parts], axis=1)
    tokens, words = (np.concatenate([arrays[name] for arrays in arrays_of_parts]) for name in ("tokens", "words"))
    corpus = Corpus(tokens, known.corpus, known.corpus_sha256)
    report = quality_of(scores, corpus, words, known.fingerprint["computed"])
    return report.to_dict() | {"agreement": None}


def _load(path: Path) -> _Scores:
    header, arrays = _KIND.load(path)
    stored = _KIND.fields(str(path), header, _FIELDS)
    if stored.pop("sha256") != arrays_identity(arrays):
        raise _KIND.damaged(str(path), "its scores are not what was written")
    stored["part"] = Part(*stored["part"])
    return _Scores(**stored, arrays=arrays)
