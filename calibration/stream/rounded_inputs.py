"""Inputs of matrix products as runtimes round them: to FP8, or to FP4 with a scale for every few values."""

import torch

from bitwright.formats.schemes.scheme import ActivationScheme

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# What compressed-tensors puts in the place of a block scale of zero.
_LEAST_E4M3 = 0.125


def round_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float32 values to the nearest of float8_e4m3fn, ties to even, clamped to +-448. By float32 arithmetic, exactly:
    Metal has no 8-bit floats."""
    values = values.clamp(-E4M3_MAX, E4M3_MAX)
    # Three bits of mantissa; below 2**-6 steps grow no smaller. A step is a power of two, made of its exponent.
    exponent = (values.view(torch.int32) >> 23 & 0xFF).clamp(min=127 - 6)
    step = (exponent - 3 << 23).view(torch.float32)
    return torch.round(values / step) * step


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, ties to the even code, clamped to +-6."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, values)


def rounded(inputs: torch.Tensor, scheme: ActivationScheme, stored: torch.Tensor | None) -> torch.Tensor:
    """What the runtime multiplies in the place of float32 inputs [..., n_columns], of a float scheme.

    stored: the scale of a static scheme [1]; of a "local" one the divisor of the whole tensor [1]; None where every
    scale is measured.
    """
    if scheme.num_bits == 8:
        return _rounded_fp8(inputs, scheme, stored)
    groups = _grouped(inputs, scheme)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if stored is None:
        scale = _power_of_two(largest)
    else:
        scale = round_e4m3(stored * largest / E2M1_MAX)
        scale = torch.where(scale == 0, _LEAST_E4M3, scale) / stored
    return (round_e2m1(groups / scale) * scale).flatten(-2)


def _grouped(inputs: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """The columns that share a scale along a dimension of their own: all of a row where the scheme has no groups."""
    n_columns = inputs.shape[-1]
    return inputs.reshape(*inputs.shape[:-1], -1, scheme.group_size or n_columns)


def _rounded_fp8(inputs: torch.Tensor, scheme: ActivationScheme, stored: torch.Tensor | None) -> torch.Tensor:
    if stored is not None:
        return round_e4m3(inputs / stored) * stored
    if scheme.strategy == "group":
        return _rounded_dynamic(_grouped(inputs, scheme)).flatten(-2)
    return _rounded_dynamic(inputs)


def _rounded_dynamic(inputs: torch.Tensor) -> torch.Tensor:
    """A scale for each row, from its largest magnitude."""
    scale = inputs.abs().amax(dim=-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_e4m3(inputs / scale) * scale


def _power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """MXFP4's scale of a block, as the runtime measures it: the exponent of the largest magnitude, rounded to E2M1's
    one bit of mantissa, less the 2 of E2M1's own largest exponent."""
    bits = largest.float().view(torch.int32)
    exponent = ((bits + (1 << 21)) >> 23).clamp(1, 254) - 127
    return torch.exp2((exponent - 2).float())
