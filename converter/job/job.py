"""A Job: everything that a conversion is asked for. Each field is an option, and says here all that is to know of it.

Nothing heavy is imported before a job is made, so that the command line can read the options before a command runs.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitwright.calibration.choices import DEFAULT_ALPHA, DEFAULT_METHOD, Alpha, Device, Dtype, Judge, RangeMethod
from bitwright.converter.boundary.machine import usable_cores
from bitwright.converter.job.defaults import BUDGET_PROFILE, CACHE_BYTES, DEFAULT_PROFILE
from bitwright.converter.job.options import CALIBRATION, DIRECTORIES, MACHINE, OUTPUT, check_fields, option, option_of
from bitwright.converter.job.spelling import (
    MOMENTS_OF_STATISTICS,
    alpha_of,
    content,
    names_in,
    path_itself,
    profile_content,
    profile_spelt,
    rule_spelt,
    rule_texts,
    statistics_content,
    text_spelt,
)
from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.errors import ConvertError
from bitwright.profiles.choices import Kept, Mode
from bitwright.profiles.sizes import parse_size, size_text

if TYPE_CHECKING:
    from bitwright.profiles.reading.protection import Protection
    from bitwright.profiles.reading.rules import LayerQuantizationConfig
    from bitwright.profiles.reading.schema import QuantizationProfile

SAMPLES_RANGE = (128, 1024)

# Options of `bitwright imatrix`, too.
_BOTH = ("convert", "imatrix")


@dataclass(frozen=True)
class Job:
    """Everything a conversion is asked for. What decides no byte has neither an identity nor a place in the recipe."""

    model: str = field(metadata=option("A Hub id, a directory or a GGUF.", commands=(), identity=None, recipe="never"))
    """A Hub id (org/name[@revision]), a directory with safetensors, or a GGUF. Not an option but an argument; its
    identity is that of its files."""

    profile: "QuantizationProfile" = field(
        metadata=option(
            "What decides the formats: a preset, a name such as Q4_K_M, or a TOML file."
            f" [default: {DEFAULT_PROFILE}; with a target {BUDGET_PROFILE}]",
            identity=profile_content,
            recipe="always",
            spell=profile_spelt,
            short="p",
        )
    )

    from_quantized: bool = field(
        default=False,
        metadata=option("Accept a GGUF that is quantized already; its errors and the new ones add up.", commands=_BOTH),
    )
    """A checkpoint that was released in codes needs no such word: nothing better exists of it."""

    base: str | None = field(
        default=None,
        metadata=option(
            "The model that a LoRA adapter is merged into. [default: as the adapter says]", "MODEL", commands=_BOTH
        ),
    )
    """Where MODEL is a LoRA adapter of peft: what it is merged into."""

    target_size: int | None = field(
        default=None,
        metadata=option(
            "Choose formats for the best file of this size, such as 1.2GiB.", "SIZE", parse=parse_size, least=1
        ),
    )
    """What the profile's budget is to meet, see Budget; and the next two."""

    target_bpw: float | None = field(
        default=None, metadata=option("Choose formats for the best file of this many bits per weight.", "BITS")
    )

    target_kld: float | None = field(
        default=None,
        metadata=option("Choose formats for the smallest file below this predicted KL divergence.", "NATS"),
    )

    refine: int = field(
        default=0,
        metadata=option(
            "Measure the whole plan of a target and correct it, in this many rounds. [default: 0]", "ROUNDS", least=0
        ),
    )

    output: Path | None = field(
        default=None,
        metadata=option(
            "The file or directory to write. [default: called after model and size]",
            identity=path_itself,
            recipe="never",
            group=OUTPUT,
            short="o",
        ),
    )
    """A directory is anything that does not end in .gguf; None for the current one."""

    overrides: "tuple[LayerQuantizationConfig, ...]" = field(
        default=(),
        metadata=option(
            "Override the format of the tensors of a role or name; may be repeated.",
            "PATTERN=FORMAT",
            name="set",
            identity=rule_texts,
            spell=rule_spelt,
        ),
    )

    imatrix: Path | None = field(
        default=None,
        metadata=option(
            "Use this importance matrix (GGUF or .dat) instead of computing one.", identity=content, group=CALIBRATION
        ),
    )

    sensitivity: Path | None = field(
        default=None,
        metadata=option("Use this sensitivity table instead of measuring one.", identity=content, group=CALIBRATION),
    )
    """What every format costs every tensor; None for measuring it where the profile needs it."""

    statistics: Path | None = field(
        default=None,
        metadata=option(
            "Use the second moments and activations in this directory instead of measuring them.",
            "DIR",
            identity=statistics_content,
            group=CALIBRATION,
        ),
    )
    """What `bitwright imatrix --merge` writes, see measure.statistics_directory."""

    analysis: bool = field(
        default=True,
        metadata=option("Let a preset spend its bytes by measured sensitivity; without it, its rules decide."),
    )

    published: bool = field(
        default=True,
        metadata=option(
            "Use an importance matrix and a sensitivity table that come with the model.",
            identity=None,
            recipe="never",
            group=CALIBRATION,
        ),
    )
    """They are named in the job then as if they had been given, and tell it from another."""

    calibration: str | None = field(
        default=None,
        metadata=option(
            "The text to calibrate on: a file, wikitext-2, or a dataset of the Hub.",
            "NAME|FILE",
            commands=_BOTH,
            recipe="always",
            spell=text_spelt,
            of_text=True,
            group=CALIBRATION,
        ),
    )

    chat: bool | None = field(
        default=None,
        metadata=option(
            "Also calibrate on conversations. [default: where there is a chat template]",
            commands=_BOTH,
            of_text=True,
            group=CALIBRATION,
        ),
    )
    """By the tokenizer's chat template; None stands for True where it has one."""

    samples: int = field(
        default=512,
        metadata=option(
            f"How many sequences the calibration reads, {SAMPLES_RANGE[0]} to {SAMPLES_RANGE[1]}.",
            shows_default=True,
            commands=_BOTH,
            recipe="always",
            of_text=True,
            group=CALIBRATION,
        ),
    )

    sequence_length: int = field(
        default=512,
        metadata=option(
            "How many tokens each of these sequences has.",
            shows_default=True,
            commands=_BOTH,
            recipe="always",
            of_text=True,
            group=CALIBRATION,
        ),
    )

    calibration_dtype: Dtype = field(
        default="auto",
        metadata=option(
            "The dtype that calibration computes in; auto takes bfloat16 on cuda, and on a CPU that is faster with it.",
            shows_default=True,
            commands=_BOTH,
            of_text=True,
            group=CALIBRATION,
        ),
    )

    protect_super_weights: Mode | None = field(
        default=None,
        metadata=option(
            "How super weights are protected. [default: as the profile says: auto, by what measurably helps]"
        ),
    )

    alpha: Alpha | None = field(
        default=None,
        metadata=option(
            f"How far SmoothQuant moves outliers into the weights. [default: {DEFAULT_ALPHA}]",
            "0..1|auto",
            parse=alpha_of,
            group=DIRECTORIES,
        ),
    )

    activation_scales: RangeMethod | None = field(
        default=None,
        metadata=option(f"How static scales of activations are chosen. [default: {DEFAULT_METHOD}]", group=DIRECTORIES),
    )

    tensor_parallel: int | None = field(
        default=None,
        metadata=option(
            "Refuse a plan that vLLM cannot split over this many GPUs.",
            "GPUS",
            least=1,
            identity=None,
            recipe="never",
            group=DIRECTORIES,
        ),
    )
    """vLLM's --tensor-parallel-size. It changes nothing in the plan."""

    effort: Effort = field(
        default="best",
        metadata=option("How long the encoders search for the best codes.", shows_default=True, identity=None),
    )
    """A part of the plan, by which jobs are compared."""

    error_feedback: Literal["quick", "best", "off"] | None = field(
        default=None,
        metadata=option(
            "Choose codes so that the errors of a row cancel; without a value: best."
            " [default: quick where the model is calibrated anyway]",
            alone=("best", "off"),
        ),
    )
    """Under the second moments of the inputs, which takes a calibration even where an importance matrix is given; but
    by default no model runs for that alone."""

    sequential: bool = field(
        default=False,
        metadata=option("Choose a layer's codes by its inputs in the artifact, encoded up to there."),
    )

    tune: int = field(
        default=0,
        metadata=option(
            "Move what every encoded layer stores towards what the source computes, in so many steps, such as 64;"
            " in sequence. [default: 0]",
            "STEPS",
            least=0,
        ),
    )

    folding: bool = field(
        default=True,
        metadata=option("Scale channels against each other where that leaves codes less error; a GGUF's."),
    )

    pre_tokenizer: str | None = field(
        default=None,
        metadata=option("The pre-tokenizer by llama.cpp's name, where it cannot be recognised.", "NAME", group=OUTPUT),
    )

    mtp: Kept = field(
        default="keep",
        metadata=option("Keep or drop the layers that predict several tokens (MTP), for drafting.", shows_default=True),
    )
    """Where llama.cpp runs none of the architecture, they are left out in any case."""

    shard_bytes: int | None = field(
        default=None,
        metadata=option(
            "Split the artifact into files of this size at most, such as 20GB.",
            "SIZE",
            name="split-size",
            parse=parse_size,
            least=1,
            group=OUTPUT,
        ),
    )

    work_dir: Path | None = field(
        default=None,
        metadata=option(
            "Where unfinished work is kept. [default: beside the output]",
            commands=_BOTH,
            identity=None,
            recipe="never",
            group=OUTPUT,
        ),
    )

    events: Path | None = field(
        default=None,
        metadata=option(
            "Append what happens to this file, as JSON lines for programs.",
            commands=_BOTH,
            identity=None,
            recipe="never",
            group=OUTPUT,
        ),
    )

    cache: Path | None = field(
        default=None,
        metadata=option(
            "Where measurements of a source are kept for its next conversion. [default: BITWRIGHT_CACHE, or"
            " ~/.cache/bitwright]",
            "DIR|off",
            commands=_BOTH,
            identity=None,
            recipe="never",
        ),
    )
    """None for the default; a path "off" for none. No result depends on it."""

    cache_size: int | None = field(
        default=None,
        metadata=option(
            "How much disk the cache may take; the least recently used goes first."
            f" [default: {size_text(CACHE_BYTES)}]",
            "SIZE",
            commands=_BOTH,
            parse=parse_size,
            least=1,
            identity=None,
            recipe="never",
        ),
    )

    threads: int = field(
        default=0,
        metadata=option(
            "How many CPU threads are used; the result does not depend on it. [default: all cores]",
            commands=_BOTH,
            least=0,
            identity=None,
            recipe="never",
            group=MACHINE,
        ),
    )

    device: Device = field(
        default="auto", metadata=option("What the model runs on.", shows_default=True, commands=_BOTH, group=MACHINE)
    )

    seed: int = field(
        default=0,
        metadata=option(
            "The seed of everything that is drawn at random.",
            shows_default=True,
            commands=_BOTH,
            least=0,
            recipe="always",
            group=MACHINE,
        ),
    )

    judge: Judge = field(
        default="full",
        metadata=option(
            "How the artifact is judged: in full, on a quarter of the text, or not at all.",
            shows_default=True,
            identity=None,
            recipe="never",
        ),
    )

    lm_eval: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Run these tasks of the lm-evaluation-harness on the artifact, comma-separated.",
            "TASKS",
            parse=names_in,
            identity=None,
            recipe="never",
        ),
    )

    lm_eval_limit: int | None = field(
        default=None,
        metadata=option(
            "How many examples of each task are run. [default: all]", least=1, identity=None, recipe="never"
        ),
    )

    extent: Literal["whole", "beginning", "end"] = field(
        default="whole",
        metadata=option("What of the job this process does.", commands=(), identity=None, recipe="never"),
    )
    """Of a job on several machines one does the beginning, up to the plan, and one the end, from the assembling on;
    what its files are is told by their content alone then, and the output is decided at the end."""

    command: str = field(
        default="the same call",
        metadata=option("What continues the job when it is run again.", commands=(), identity=None, recipe="never"),
    )

    def __post_init__(self) -> None:
        """Raises ConvertError for a value that its field cannot have."""
        from bitwright.calibration.statistics.smoothing import SmoothQuantConfig

        check_fields(self)
        SmoothQuantConfig(self.alpha or 0)

    def identity(self, command: str = "convert") -> dict[str, object]:
        """What its options say that decides whether this job may be continued, as plain JSON data by field.

        command: whose options count.
        """
        job = replace(self, protect_super_weights=self.protection.super_weights)  # the profile may say the same
        return {
            each.name: identity(getattr(job, each.name))
            for each in fields(job)
            if command in option_of(each).commands and (identity := option_of(each).identity) is not None
        }

    def aimed(self) -> "Job":
        """This job with its targets in its profile, and without what is measured where no analysis is wanted."""
        targets = {"--target-size": self.target_size, "--target-bpw": self.target_bpw, "--target-kld": self.target_kld}
        where = ", ".join(option for option, target in targets.items() if target is not None)
        profile = self.profile.aiming_at(self.target_size, self.target_bpw, self.target_kld, where)
        if not self.analysis:
            profile = profile.by_rules()
            if profile.needs_sensitivity:
                raise ConvertError(
                    f"the profile {profile.name!r} has no rules that decide without a measurement",
                    ", ".join(filter(None, ("--no-analysis", where))),
                    "leave --no-analysis out, or name a preset that has: `bitwright profiles list` describes each",
                )
        if self.refine and (profile.budget is None or not profile.budget.has_goal):
            raise ConvertError(
                "what is refined is the plan of a budget, and nothing asks for one",
                "--refine",
                "add --target-size SIZE, --target-bpw BITS or --target-kld NATS",
            )
        return replace(self, profile=profile)

    @property
    def protection(self) -> "Protection":
        """The profile's, with the way that the job asks for."""
        protection = self.profile.protection
        return replace(protection, super_weights=self.protect_super_weights or protection.super_weights)

    @property
    def feedback(self) -> FeedbackLevel | None:
        """How long codes are chosen together; None for leaving that out. See `feedback_is_asked_for`."""
        if self.error_feedback is None:
            given = self.statistics is not None and (self.statistics / MOMENTS_OF_STATISTICS).is_dir()
            return "quick" if self.imatrix is None or given or self.in_sequence else None
        return None if self.error_feedback == "off" else self.error_feedback

    @property
    def in_sequence(self) -> bool:
        """Whether layers are encoded one after the other, on a pass over the model of their own."""
        return self.sequential or self.tune > 0

    @property
    def feedback_is_asked_for(self) -> bool:
        """By the option; otherwise it is the default, which costs no run of the model of its own."""
        return self.error_feedback in ("quick", "best")

    @property
    def n_threads(self) -> int:
        return self.threads or usable_cores()
