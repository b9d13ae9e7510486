"""What the calibrated model computes in, where the job leaves that open: decided once, when the job begins."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.calibration.fastest_dtype import DTYPES, Choice, bfloat16_instructions, fastest_dtype
from bitwright.converter.artifact.run import Run

_FIELD = "calibration_dtype"
# Multiplications with weights of the layers for which it is worth a second to find the faster dtype: about half a
# minute of two cores.
WORTH_MEASURING = 5e12


def with_decided_dtype(run: Run, description: Mapping[str, Any]) -> Run:
    """The run with a dtype in the place of "auto". description: what the work directory says of its job, where it has
    one, in which case it stays with what was decided then."""
    if run.job.calibration_dtype != "auto":
        return run
    choice = _choice(run, description.get(_FIELD))
    if choice.why:
        run.progress.say(f"calibration in {choice.dtype}: {choice.why}")
    return replace(run, job=replace(run.job, calibration_dtype=choice.dtype))


def _choice(run: Run, before: object) -> Choice:
    known = next((dtype for dtype in DTYPES if dtype == before), None)
    if known is not None:
        return Choice(known, "")
    from bitwright.calibration.stream.build import choose_device, choose_dtype

    device = choose_device(run.job.device)
    if device.type != "cpu":
        on_device = choose_dtype("auto", device)
        return Choice("bfloat16" if on_device.itemsize == 2 else "float32", "")
    if _products(run) < WORTH_MEASURING:
        return Choice("float32", "")
    if not _attends_in_float32(run.checkpoint.location):
        return Choice("float32", "the model's own attention would have its logits in bfloat16")
    # Near the limit two measurements may decide differently, and what was measured in the one would be of no use to a
    # conversion in the other.
    cached = run.cache.entry("calibration dtype", instructions=bfloat16_instructions())
    return Choice(**cached.json_result(lambda: fastest_dtype()._asdict()))


def _attends_in_float32(location: Path) -> bool:
    """Whether attention is torch's, which has its logits in float32 whatever it is given; not known of a GGUF, which is
    no directory that transformers can load yet."""
    import torch

    from bitwright.calibration.stream.build import build_without_weights, load_config

    if not location.is_dir():
        return False
    model = build_without_weights(load_config(location), torch.bfloat16, torch.device("cpu"))
    return str(model.config._attn_implementation) == "sdpa"


def _products(run: Run) -> int:
    weights = sum(tensor.n_weights for tensor in run.model_map.tensors if tensor.layer is not None)
    return run.job.samples * run.job.sequence_length * weights
