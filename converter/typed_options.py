"""The options that Python takes by name, for editors and type checkers.

Written by `python -m scripts.typed_options` from the fields of converter.job.job.Job, which describe each and decide at
run time. Nothing is to be changed here.
"""

from pathlib import Path
from typing import Literal, TypedDict

from bitwright.calibration.choices import Alpha, Device, Dtype, Judge, RangeMethod
from bitwright.formats.choices import Effort
from bitwright.profiles.choices import Kept, Mode


class Options(TypedDict, total=False):
    """As of converter.job.job.Job, where each is described."""

    from_quantized: bool
    base: str | None
    target_size: int | str | None
    target_bpw: float | None
    target_kld: float | None
    refine: int
    imatrix: Path | str | None
    sensitivity: Path | str | None
    statistics: Path | str | None
    analysis: bool
    published: bool
    calibration: str | None
    chat: bool | None
    samples: int
    sequence_length: int
    calibration_dtype: Dtype
    protect_super_weights: Mode | None
    alpha: Alpha | str | None
    activation_scales: RangeMethod | None
    tensor_parallel: int | None
    effort: Effort
    error_feedback: Literal["quick", "best", "off"] | bool | None
    sequential: bool
    tune: int
    folding: bool
    pre_tokenizer: str | None
    mtp: Kept
    shard_bytes: int | str | None
    work_dir: Path | str | None
    events: Path | str | None
    cache: Path | str | None
    cache_size: int | str | None
    threads: int
    device: Device
    seed: int
    judge: Judge
    lm_eval: str | list[str] | tuple[str, ...]
    lm_eval_limit: int | None
    extent: Literal["whole", "beginning", "end"]
    command: str
