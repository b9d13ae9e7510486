"""The stage `quality`: the artifact's weights, decoded, beside the checkpoint's, through the same layer stream."""

from typing import Any

from bitwright.calibration.choices import CacheRounding
from bitwright.calibration.evaluation.quality import stream_quality, stream_quality_by_position
from bitwright.calibration.text.words import word_numbers
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.job.kept import kept_json
from bitwright.converter.judge.judging import Judging
from bitwright.formats.errors import ConvertError
from bitwright.formats.typed import to_plain
from bitwright.profiles.vocabulary import ModelMap, Role


def streamed_quality(judging: Judging, candidate: Candidate) -> dict[str, Any]:
    """The quality of an artifact as plain data. Measured once: the result stays in the work directory, and so do the
    artifact's logits of the first sample, for the stage `agreement`."""
    scratch = judging.work_dir / "quality"

    def compute() -> dict[str, Any]:
        corpus = judging.held_out(judging.text, judging.samples, judging.sequence_length)
        report = stream_quality(
            judging.source_model,
            candidate.weights,
            corpus,
            judging.control("quality"),
            words=word_numbers(corpus.tokens, judging.tokenizer),
            arithmetic=candidate.arithmetic,
            known=judging.cache.states(corpus),
            logits=judging.candidate_logits,
        )
        return report.to_dict()

    def answers(kept: dict[str, Any]) -> bool:
        return int(kept["samples"]) >= judging.samples

    path = judging.work_dir / "quality.json"
    return kept_json(path, "quality report", judging.progress, compute, scratch, answers)


def quality_with_cache(judging: Judging, candidate: Candidate, kv: CacheRounding) -> dict[str, Any]:
    """The quality with keys and values in a format, as plain data; "agreement" is None, and "by_position" has the
    divergence over the length of the text. Raises ConvertError for latent attention."""
    from bitwright.calibration.stream.key_values import RoundedCache

    if any(tensor.role is Role.ATTENTION_LATENT for tensor in judging.model_map.tensors):
        raise ConvertError(
            "the model keeps a latent in the place of keys and values, and transformers what is made of it",
            f"--kv {kv}",
            "leave out --kv: the loss of such a cache can only be measured in its runtime",
        )
    corpus = judging.held_out(judging.text, judging.samples, judging.sequence_length)
    report, spans = stream_quality_by_position(
        judging.source_model,
        candidate.weights,
        corpus,
        judging.control("quality"),
        words=word_numbers(corpus.tokens, judging.tokenizer),
        arithmetic=RoundedCache(kv, candidate.arithmetic, _key_rows(judging.model_map) if candidate.gguf else None),
    )
    return report.to_dict() | {"agreement": None, "kv": kv, "by_position": to_plain(spans)}


def _key_rows(model_map: ModelMap) -> list[int] | None:
    """The order that a GGUF has the rows of key projections in, where it is not the checkpoint's."""
    for tensor in model_map.tensors:
        if tensor.role is Role.ATTENTION_KEY and tensor.layout.rows is not None:
            return [int(row) for row in tensor.layout.rows.indices()]
    return None
