"""Inputs are rounded as compressed-tensors rounds them: to the bit, in every scheme that rounds to floating point."""

from dataclasses import asdict

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from bitwright.calibration.stream.rounded_inputs import rounded
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.formats.schemes.scheme import ActivationScheme

FLOAT = {n: s.activations for n, s in SCHEMES.items() if s.activations is not None and s.activations.type == "float"}
N_TOKENS, N_COLUMNS = 64, 512


def inputs(seed: int) -> torch.Tensor:
    """float32 [1, N_TOKENS, N_COLUMNS]: magnitudes over many octaves, outliers, ties of the grid, zeros of whole tokens
    and of whole groups."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((1, N_TOKENS, N_COLUMNS), generator=generator)
    values *= torch.exp2(torch.randint(-12, 6, (1, N_TOKENS, 1), generator=generator).float())
    values[..., 7] *= 100
    values[:, 1] = 0
    values[:, 2, :128] = 0
    values[:, 3] = 0.25 * torch.randint(-24, 25, (N_COLUMNS,), generator=generator)
    values[:, 4, 0] = 2.0**-30
    return values


def theirs(values: torch.Tensor, scheme: ActivationScheme, stored: torch.Tensor | None) -> torch.Tensor:
    given = {key: value for key, value in asdict(scheme).items() if value is not None}
    arguments = QuantizationArgs.model_validate(given)
    if scheme.dynamic is False:
        zero_point = torch.zeros(1)
        assert stored is not None
        return fake_quantize(values, stored, zero_point, arguments)
    scale, zero_point = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Module(), global_scale=stored)
    return fake_quantize(values, scale, zero_point, arguments, global_scale=stored)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FLOAT)
def test_to_the_bit(name, seed):
    scheme, values = FLOAT[name], inputs(seed)
    stored = None
    if scheme.dynamic is False:
        stored = values.abs().max()[None] / 448 * 0.7  # some values are clamped
    elif scheme.dynamic == "local":
        stored = 448 * 6 / values.abs().max()[None] * 1.3  # some scales are
    found = rounded(values, scheme, stored)
    expected = theirs(values, scheme, stored)
    assert not torch.equal(found, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_float_scheme_is_here():
    assert set(FLOAT) == {"FP8", "FP8_STATIC", "FP8_BLOCK", "NVFP4", "MXFP4"}
