"""Which precision the inputs of each matrix can bear: a function of their statistics, and of what the model is for.

Every scheme has a limit, on the figure of the inputs that its rounding depends on:

    W8A8                     token_range   <= 6    INT8, a scale for every token: at 6 bits one step of the grid is half
                                                   of what a typical channel holds, and 2 % of its energy is error
    W8A8_STATIC              dynamic_range <= 7    one for all, whose range may cut rare values off
    FP8, FP8_BLOCK           token_range   <= 14   E4M3 has 14.8 octaves between 448 and its least normal number, below
    FP8_STATIC               dynamic_range <= 14   which a typical channel loses its precision
    NVFP4                    outlier_ratio <= 12   FP4 has 0.5 to 6: beyond 12 the neighbours of an outlier, which share
    MXFP4                    outlier_ratio <= 6    its scale, become zero; a scale that is a power of two halves that

Where it has been measured, what INT8 weights and inputs leave in a matrix's output is limited too: an outlier that was
moved into the weights does no less harm there. Weights alone (W8A16, W4A16, ...) and 16 bits bear anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.fallbacks import schemes_by_inputs
from bitwright.profiles.reading.activations import Phase
from bitwright.profiles.vocabulary import Role

Figure = Literal["token_range", "dynamic_range", "outlier_ratio"]

UNQUANTIZED = "BF16"

LIMITS: dict[str, tuple[Figure, float]] = {
    "W8A8": ("token_range", 6.0),
    "W8A8_STATIC": ("dynamic_range", 7.0),
    "W8A8_STATIC_ASYM": ("dynamic_range", 7.0),
    "FP8": ("token_range", 14.0),
    "FP8_BLOCK": ("token_range", 14.0),
    "FP8_STATIC": ("dynamic_range", 14.0),
    "NVFP4": ("outlier_ratio", 12.0),
    "MXFP4": ("outlier_ratio", 6.0),
}
"""Scheme -> the figure that limits it, and up to where it serves."""

INT8_ERROR_LIMIT = 0.01
"""The largest relative squared error of a matrix's output that INT8 weights and inputs may leave."""

_ATTENTION_INPUTS = frozenset({Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE, Role.ATTENTION_QKV})
_FIGURE_TEXT: dict[Figure, str] = {
    "token_range": "a token's largest value is 2**{:.1f} times a typical channel",
    "dynamic_range": "the largest value is 2**{:.1f} times a typical channel",
    "outlier_ratio": "the largest channel is {:.1f} times the median one",
}


class InputFigures(Protocol):
    """What InputFigures of calibration/statistics says of the inputs of a tensor's matrices, after smoothing."""

    @property
    def rows(self) -> int: ...
    @property
    def outlier_ratio(self) -> float: ...
    @property
    def token_range(self) -> float: ...
    @property
    def dynamic_range(self) -> float: ...


@dataclass(frozen=True)
class Context:
    """What the model is for. phase: where its time is spent: in prompts (products of matrices, bound by arithmetic), in
    generating (bound by reading weights), or both. sequence_length: of the longest prompts in use; calibrated_length:
    of the samples that the statistics come from. fp8_kv_cache: whether keys and values are rounded once more."""

    phase: Phase = "both"
    sequence_length: int = 4096
    calibrated_length: int = 512
    fp8_kv_cache: bool = False


@dataclass(frozen=True)
class PrecisionChoice:
    """tensor: the name asked under. scheme: compressed-tensors' name, or BF16. wanted: what the profile asks for.
    reason: why it is another, or how far from its limit the wanted one is. alternative: the option that takes the
    wanted scheme all the same, "" where it was taken."""

    tensor: str
    scheme: str
    wanted: str
    reason: str
    alternative: str

    @property
    def fell_back(self) -> bool:
        return self.scheme != self.wanted


def choose_precisions(
    wanted: Mapping[str, str],
    roles: Mapping[str, Role],
    figures: Mapping[str, InputFigures],
    context: Context,
    overridden: Iterable[str] = (),
    errors: Mapping[str, float] | None = None,
) -> list[PrecisionChoice]:
    """One choice for every tensor in `wanted` (name -> scheme), in its order. overridden: tensors whose scheme
    the user has named: they keep it. errors: relative squared errors of outputs in INT8, of those that were measured.

    Raises ConvertError for a tensor whose scheme rounds its inputs, and of whose inputs nothing is known.
    """
    fixed = set(overridden)
    return [
        PrecisionChoice(tensor, scheme, scheme, "as asked for", "")
        if tensor in fixed
        else choose_precision(
            tensor, scheme, roles[tensor], figures.get(tensor), context, None if errors is None else errors.get(tensor)
        )
        for tensor, scheme in wanted.items()
    ]


def choose_precision(
    tensor: str,
    wanted: str,
    role: Role,
    figures: InputFigures | None,
    context: Context,
    error: float | None = None,
) -> PrecisionChoice:
    """The wanted scheme where the inputs are within its limit, otherwise the first of its fallbacks that serves. Raises
    as choose_precisions does."""
    if wanted not in LIMITS:
        return PrecisionChoice(tensor, wanted, wanted, "its inputs stay in 16 bits", "")
    if figures is None or not figures.rows:
        raise ConvertError(
            f"{wanted} rounds the inputs of this tensor, and the calibration has seen none",
            f"tensor {tensor}",
            f"calibrate on more text (--samples, --calibration), or leave it: --set '{tensor}={UNQUANTIZED}'",
        )
    refusals = []
    for scheme in schemes_by_inputs(wanted):
        figure, limit = LIMITS[scheme]
        limit -= _margin(scheme, figure, role, context)
        value = getattr(figures, figure)
        harmed = scheme.startswith("W8A8") and error is not None and error > INT8_ERROR_LIMIT
        if harmed:
            refusals.append(f"in INT8 its output is off by {error:.1%} of its energy, beyond {INT8_ERROR_LIMIT:.0%}")
            continue
        if value <= limit:
            reason = f"{_FIGURE_TEXT[figure].format(value)}, and {scheme} bears {_limit_text(figure, limit)}"
            break
        refusals.append(f"{_FIGURE_TEXT[figure].format(value)}, and {scheme} bears {_limit_text(figure, limit)}")
    else:
        # Weights alone cost nothing where reading them is what takes the time, and slow prompts down otherwise.
        scheme = "W8A16" if context.phase == "decode" else UNQUANTIZED
        reason = "nothing rounds its inputs"
    alternative = f"--set '{tensor}={wanted}'" if refusals else ""
    return PrecisionChoice(tensor, scheme, wanted, "; ".join([*refusals, reason]), alternative)


def _margin(scheme: str, figure: Figure, role: Role, context: Context) -> float:
    """By how much a limit is lowered: in bits, and for a ratio in halves of it."""
    bits = 0.0
    # Scales that are computed beforehand have to hold for what the calibration's samples were too short to show.
    if figure == "dynamic_range" and context.sequence_length > 8 * context.calibrated_length:
        bits += 0.5
    # Query, key and value alike: runtimes fuse them, and refuse them in different schemes.
    if context.fp8_kv_cache and role in _ATTENTION_INPUTS:
        bits += 1.0
    return bits if figure != "outlier_ratio" else LIMITS[scheme][1] * (1 - 2.0**-bits)


def _limit_text(figure: Figure, limit: float) -> str:
    return f"{limit:g}" if figure == "outlier_ratio" else f"2**{limit:g}"
