"""Schemes against compressed-tensors itself: what it reads from our tensors, and what its own scales would cost."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import NUMPY_DTYPES
from bitwright.formats.parts import ScalarParts
from bitwright.formats.registry import FORMATS
from bitwright.formats.schemes.packed_int import pack, unpack
from bitwright.formats.schemes.registry import SCHEMES, Scheme, get_scheme
from bitwright.formats.schemes.scheme import Tensors

TORCH_DTYPES = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
# One scheme of each way to store weights; the others differ in activations only.
STORAGE = [
    name
    for name in SCHEMES
    if name not in ("W8A8_STATIC", "W8A8_STATIC_ASYM", "NVFP4A16", "MXFP4A16")
]  # fmt: skip
# Those whose scales and levels can be moved.
TUNABLE = [name for name in STORAGE if SCHEMES[name].is_tunable]


def arguments(part) -> QuantizationArgs | None:
    if part is None:
        return None
    fields = {key: value for key, value in vars(part).items() if value is not None}
    if "block_structure" in fields:
        fields["block_structure"] = list(fields["block_structure"])
    return QuantizationArgs(**fields)


def peer_scheme(scheme: Scheme) -> QuantizationScheme:
    weights, activations = arguments(scheme.weights), arguments(scheme.activations)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=scheme.format)


def to_torch(scheme: Scheme, tensors, shape) -> dict[str, torch.Tensor]:
    """As safetensors loads them."""
    dtypes = {suffix: dtype for suffix, (dtype, _) in scheme.tensors(*shape).items()}
    as_is = {suffix: torch.from_numpy(tensor.copy()) for suffix, tensor in tensors.items()}
    return {s: t.view(TORCH_DTYPES[dtypes[s]]) if dtypes[s] in TORCH_DTYPES else t for s, t in as_is.items()}


def peer_decode(scheme: Scheme, tensors, shape, float32_scales: bool) -> np.ndarray:
    loaded = to_torch(scheme, tensors, shape)
    if float32_scales and loaded["weight_scale"].dtype == torch.bfloat16:
        loaded["weight_scale"] = loaded["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(loaded, peer_scheme(scheme))["weight"].float().numpy()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def peer_minmax(scheme: Scheme, rows: np.ndarray) -> np.ndarray:
    """The weights after compressed-tensors' own quantization by the extremes, in float32 throughout."""
    weights = scheme.weights
    x, arguments_ = torch.from_numpy(rows), peer_scheme(scheme).weights
    height, width = weights.block_structure or (1, weights.group_size or rows.shape[1])
    if weights.strategy == "tensor":
        height = rows.shape[0]
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % width, 0, -x.shape[0] % height))
    blocks = blocks.reshape(blocks.shape[0] // height, height, -1, width)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if weights.strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    divisor = generate_gparam(x.min(), x.max()) if weights.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(low, high, arguments_, global_scale=divisor)
    state = {"weight": x, "weight_scale": scale.float(), "weight_zero_point": zero_point}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    packed = compressor.compress(state, peer_scheme(scheme))
    return compressor.decompress(packed, peer_scheme(scheme))["weight"].float().numpy()


def draw(kind: str, shape, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        rows = rng.standard_normal(shape)
    elif kind == "student-t":
        rows = rng.standard_t(4, shape)
    else:
        rows = rng.standard_normal(shape) + 3
    return np.ascontiguousarray(0.02 * rows, np.float32)


def shape_for(scheme: Scheme) -> tuple[int, int]:
    """Odd where that is legal."""
    width = scheme.weights.group_size or (scheme.weights.block_structure or (0, 0))[1]
    return (37 if width < 128 else 131, 3 * width if width else 77)


def relative_error(rows, decoded, importance=1.0) -> float:
    return float((importance * (decoded - rows).astype(np.float64) ** 2).sum() / (importance * rows**2.0).sum())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_compressed_tensors_reads_what_we_decode(name, effort):
    scheme = SCHEMES[name]
    rows = draw("student-t", shape_for(scheme))
    rows[3] = 0
    tensors = scheme.encode(rows, effort=effort)
    decoded = scheme.decode(tensors, rows.shape)
    assert np.isfinite(decoded).all()
    assert (decoded[3] == 0).all()
    # Its arithmetic is that of the scales' dtype, but for FP4, whose result it rounds to bfloat16 always.
    exact = peer_decode(scheme, tensors, rows.shape, float32_scales=True)
    np.testing.assert_array_equal(exact, to_bfloat16(decoded) if "FP4" in name else decoded)
    np.testing.assert_array_equal(peer_decode(scheme, tensors, rows.shape, float32_scales=False), to_bfloat16(decoded))


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_are_known_before(name):
    scheme = SCHEMES[name]
    shape = shape_for(scheme)
    expected = scheme.tensors(*shape)
    tensors = scheme.encode(draw("gaussian", shape)) | scheme.encode_input(-2.0, 3.0)
    found = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in tensors.items()}
    assert found == {suffix: (NUMPY_DTYPES[dtype], tuple(shape)) for suffix, (dtype, shape) in expected.items()}
    assert scheme.n_bytes(*shape) == sum(tensor.nbytes for tensor in tensors.values())
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("kind", ["gaussian", "student-t", "shifted"])
def test_error_is_at_most_that_of_the_extremes(name, kind):
    scheme = SCHEMES[name]
    rows = draw(kind, (128, 512))
    importance = np.random.default_rng(1).lognormal(0, 1.5, 512).astype(np.float32)
    peer = peer_minmax(scheme, rows)
    ours = scheme.decode(scheme.encode(rows), rows.shape)
    weighted = scheme.decode(scheme.encode(rows, importance), rows.shape)
    assert relative_error(rows, to_bfloat16(ours) if "FP4" in name else ours) <= relative_error(rows, peer)
    assert relative_error(rows, weighted, importance) <= relative_error(rows, peer, importance)
    assert relative_error(rows, weighted, importance) <= relative_error(rows, ours, importance)


@pytest.mark.parametrize("name", STORAGE)
def test_bytes_depend_on_no_thread_and_no_other_row(name, monkeypatch):
    scheme = SCHEMES[name]
    rows = draw("student-t", (128 * 5 + 3, shape_for(scheme)[1]))
    importance = np.random.default_rng(1).lognormal(0, 1, rows.shape[1]).astype(np.float32)
    monkeypatch.setattr("bitwright.formats.schemes.row_chunks.CHUNK_WEIGHTS", 1 << 14)
    whole = scheme.encode(rows, importance)
    threads = scheme.encode(rows, importance, n_threads=3)
    assert all(np.array_equal(whole[suffix], threads[suffix]) for suffix in whole)
    shared = scheme.shared_scale(lambda: [rows], importance) if scheme.has_global_scale else None
    top = scheme.encode(rows[:256], importance, global_scale=shared)
    assert np.array_equal(scheme.decode(top, (256, rows.shape[1])), scheme.decode(whole, rows.shape)[:256])


def test_nvfp4_and_mxfp4_hold_the_values_of_the_gguf_codecs():
    rows = draw("student-t", (9, 192))
    scale = FORMATS["NVFP4"].tensor_scale(float(np.abs(rows).max()))
    gguf = FORMATS["NVFP4"].decode(FORMATS["NVFP4"].encode(rows, tensor_scale=scale)) * np.float32(scale)
    ours = SCHEMES["NVFP4A16"].decode(SCHEMES["NVFP4A16"].encode(rows), rows.shape)
    np.testing.assert_array_equal(ours, gguf)
    gguf = FORMATS["MXFP4"].decode(FORMATS["MXFP4"].encode(rows))
    np.testing.assert_array_equal(SCHEMES["MXFP4A16"].decode(SCHEMES["MXFP4A16"].encode(rows), rows.shape), gguf)


@pytest.mark.parametrize("low, high", [(-3.7, 5.25), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-3, 2e-3)])
@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8_STATIC", "NVFP4"])
def test_input_scales_are_those_of_compressed_tensors(name, low, high):
    scheme = SCHEMES[name]
    ours = to_torch(scheme, scheme.encode_input(low, high), (16, 16))
    bounds = torch.tensor([low]), torch.tensor([high])
    if name == "NVFP4":
        if high > low:
            assert ours["input_global_scale"].item() == pytest.approx(generate_gparam(*bounds).item(), rel=1e-6)
        assert np.isfinite(ours["input_global_scale"].item())
        return
    scale, zero_point = calculate_qparams(*bounds, arguments(scheme.activations))
    assert ours["input_scale"].item() > 0
    if high > low:
        assert ours["input_scale"].item() == scale.bfloat16().item()
        if name == "W8A8_STATIC_ASYM":
            assert abs(ours["input_zero_point"].item() - zero_point.item()) <= 1


def encoded_to_be_tuned(name: str, distribution: str) -> tuple[Scheme, np.ndarray, Tensors]:
    """The scheme, rows of which one is zero, and what they are encoded as."""
    scheme = SCHEMES[name]
    rows = draw(distribution, shape_for(scheme))
    rows[3] = 0
    return scheme, rows, scheme.encode(rows, effort="fast")


@pytest.mark.parametrize("name", TUNABLE)
def test_rows_that_can_be_tuned_are_the_matrix(name):
    scheme, rows, tensors = encoded_to_be_tuned(name, "student-t")
    tunable = scheme.tunable(tensors, rows.shape)
    decoded = tunable.blocks.decode(tunable.data) / tunable.factor
    np.testing.assert_allclose(decoded, scheme.decode(tensors, rows.shape), rtol=1e-6)
    same = scheme.tuned(tunable.data, tensors)
    assert same.keys() == tensors.keys() and all(np.array_equal(same[suffix], tensors[suffix]) for suffix in tensors)


@pytest.mark.parametrize("name", TUNABLE)
def test_what_was_moved_is_what_compressed_tensors_reads(name):
    """Scales by 3 % or to the next one that can be stored, levels to the next one."""
    scheme, rows, tensors = encoded_to_be_tuned(name, "shifted")
    tunable = scheme.tunable(tensors, rows.shape)
    blocks = tunable.blocks
    parts = blocks.open(tunable.data)
    places = np.searchsorted(blocks.levels, parts.levels)
    last = np.full((len(places), 1), len(blocks.levels) - 1)
    if tunable.places is not None:
        last = tunable.places[..., 1].reshape(-1, 1)
        assert (places >= tunable.places[..., 0].reshape(-1, 1)).all()
    levels = blocks.levels[np.minimum(places + 1, last)]
    scales = parts.scales.copy()
    scales[:, 0] = np.minimum(scales[:, 0] + 1, len(blocks.scale_table) - 1)
    units = parts.units if tunable.nearest_units is None else tunable.nearest_units(parts.units * np.float32(1.03))
    packed = blocks.pack(ScalarParts(units, scales, levels)).reshape(tunable.data.shape)
    moved = scheme.tuned(packed, tensors)
    decoded = scheme.decode(moved, rows.shape)
    exact = peer_decode(scheme, moved, rows.shape, float32_scales=True)
    np.testing.assert_array_equal(exact, to_bfloat16(decoded) if "FP4" in name else decoded)
    wanted = blocks.decode(packed) / tunable.factor
    np.testing.assert_allclose(decoded, wanted, rtol=1e-6)
    assert not np.array_equal(moved["weight_scale"], tensors["weight_scale"])
    for suffix in {"weight_zero_point", "weight_shape", "weight_global_scale"} & tensors.keys():
        assert np.array_equal(moved[suffix], tensors[suffix])
    if scheme.weights.type == "int":
        assert (decoded[3] == 0).all()


def test_bad_input_is_refused():
    rows = draw("gaussian", (4, 128))
    scheme = SCHEMES["W4A16"]
    for bad in (np.nan, np.inf):
        spoilt = rows.copy()
        spoilt[2, 5] = bad
        for each in SCHEMES.values():
            with pytest.raises(ConvertError, match="not a finite number") as raised:
                each.encode(spoilt)
            assert raised.value.where == "row 2, column 5"
    with pytest.raises(ConvertError, match="importance"):
        scheme.encode(rows, np.full(128, -1, np.float32))
    with pytest.raises(ConvertError, match="W4A16_G64 or W4A16_G32"):
        scheme.encode(np.ones((4, 192), np.float32))
    with pytest.raises(ConvertError, match=r"give it FP8 or FP8_STATIC$"):
        SCHEMES["FP8_BLOCK"].check_shape(128, 100, "a tensor")
    with pytest.raises(ConvertError, match="leave it unquantized"):
        SCHEMES["W8A8"].check_shape(0, 100, "a tensor")
    with pytest.raises(ConvertError, match="did you mean 'W4A16_ASYM'"):
        get_scheme("w4a16-asim")
    assert get_scheme("w4a16-asym-g32") is SCHEMES["W4A16_ASYM_G32"]


@pytest.mark.parametrize("name", STORAGE)
def test_nothing_important_is_everything_alike(name):
    scheme = SCHEMES[name]
    rows = draw("student-t", (128, 256))
    plain, unimportant = scheme.encode(rows), scheme.encode(rows, np.zeros(256, np.float32))
    assert all(np.array_equal(plain[suffix], unimportant[suffix]) for suffix in plain)
    zero = scheme.encode(np.zeros((128, 256), np.float32))
    scales = peer_decode(scheme, zero, (128, 256), float32_scales=False)
    assert (scales == 0).all()
    assert (zero["weight_scale"] != 0).all() or scheme.format == "mxfp4-pack-quantized"


def bfloat16_scales_below(largest: float, octaves: float) -> np.ndarray:
    """Every bfloat16 from `largest` down."""
    first = np.float32(largest).view(np.int32) >> 16
    return ((np.arange(first + 1, first - int(128 * octaves), -1, dtype=np.int32)) << 16).view(np.float32)


def least_integer_error(x, w, bottom, top, symmetric):
    """By trying every bfloat16 scale and every zero point, in float64; symmetric: None of one sign only."""
    if symmetric and bottom == -8:  # its scale may be negative
        both = [least_integer_error(sign * x, w, bottom, top, None) for sign in (1, -1)]
        return min(both)
    symmetric = symmetric is not False
    low, high = min(0, x.min()), max(0, x.max())
    widest = max(high / (top - 1), low / (bottom + 1)) if symmetric else (high - low) / (top - bottom - 1)
    scales = bfloat16_scales_below(widest, 2.5).astype(np.float64)[:, None]
    least = np.inf
    for zero_point in [0] if symmetric else range(bottom, top + 1):
        codes = np.clip(np.rint(x / scales), bottom - zero_point, top - zero_point)
        least = min(least, (w * (x - scales * codes) ** 2).sum(axis=1).min())
    return least


@pytest.mark.parametrize("name", ["W8A8", "W8A16", "W4A16_G32", "W4A16", "W4A16_ASYM_G32", "W4A16_ASYM"])
def test_best_finds_the_least_error_of_all_integer_scales(name):
    scheme = SCHEMES[name]
    bits, group = scheme.weights.num_bits, scheme.weights.group_size or 77
    rng = np.random.default_rng(5)
    # An asymmetric search refines a few pairs of scale and zero point only, which may miss the least error by a little.
    slack = 1e-5 if scheme.weights.symmetric else 1e-3
    ratios = []
    for i in range(24):
        x = 0.02 * rng.standard_t(4, group) + (0.05 if i % 4 == 1 else 0)
        importance = np.ones(group) if i % 3 == 0 else rng.lognormal(0, 2, group)
        x, importance = x.astype(np.float32), importance.astype(np.float32)
        decoded = scheme.decode(scheme.encode(x[None], importance), (1, group))[0].astype(np.float64)
        exact, weights = x.astype(np.float64), importance.astype(np.float64)
        bottom, top = -(1 << bits - 1), (1 << bits - 1) - 1
        best = least_integer_error(exact, weights, bottom, top, scheme.weights.symmetric)
        error = (weights * (exact - decoded) ** 2).sum()
        ratios.append(error / best)
        if scheme.weights.symmetric:
            assert ratios[-1] <= 1 + slack
    assert np.mean(ratios) <= 1 + slack


def test_golden_bytes():
    """What can be checked by hand: multiples of a scale, packed."""
    rows = np.zeros((2, 32), np.float32)
    rows[0, :8] = [-8, -7, -1, 0, 1, 2, 3, 7]
    rows[1, :2] = [8, -7]
    tensors = SCHEMES["W4A16_G32"].encode(rows)
    # Scale 1, and -1, as 8 is no code; a code q is stored as q + 8, the first in the lowest four bits.
    assert tensors["weight_scale"].tolist() == [[0x3F80], [0xBF80]]
    assert tensors["weight_packed"].view(np.uint32)[0].tolist() == [0xFBA98710, *[0x88888888] * 3]
    assert tensors["weight_packed"].view(np.uint32)[1].tolist() == [0x888888F0, *[0x88888888] * 3]
    assert tensors["weight_shape"].tolist() == [2, 32]

    # From 0 to 15: scale 1 and zero point -8, stored as 0; zero points are packed down the column.
    rows = np.tile(np.arange(16, dtype=np.float32), (3, 2))
    tensors = SCHEMES["W4A16_ASYM_G32"].encode(rows)
    assert (tensors["weight_scale"] == 0x3F80).all()
    assert tensors["weight_zero_point"].view(np.uint32).tolist() == [[0x00000000]]
    assert tensors["weight_packed"].view(np.uint32)[0].tolist() == [0x76543210, 0xFEDCBA98] * 2

    # A tensor scale of 1/256 lets the block whose greatest magnitude is 6 have the block scale 256 (E4M3: 0x78).
    rows = np.tile(np.array([0.5, -0.5, 1, 1.5, 2, 3, 4, -6], np.float32), (1, 4))
    rows[0, 16:] = 0
    tensors = SCHEMES["NVFP4A16"].encode(rows)
    assert tensors["weight_global_scale"].tolist() == [256]
    assert tensors["weight_scale"].tolist() == [[0x78, 0x20]]
    assert tensors["weight_packed"][0, :8].tolist() == [0x91, 0x32, 0x54, 0xF6] * 2
    assert (tensors["weight_packed"][0, 8:] == 0).all()

    # MXFP4: a scale of one is stored as 127.
    tensors = SCHEMES["MXFP4A16"].encode(rows)
    assert tensors["weight_scale"].tolist() == [[127]]
    assert tensors["weight_packed"][0, :4].tolist() == [0x91, 0x32, 0x54, 0xF6]

    # FP8: one is 0x38, with scale 1 as the greatest magnitude is 448.
    rows = np.array([[448, -1, 0.5, 2.0**-9]], np.float32)
    tensors = SCHEMES["FP8"].encode(rows)
    assert tensors["weight_scale"].tolist() == [[0x3F80]]
    assert tensors["weight"].tolist() == [[0x7E, 0xB8, 0x30, 0x01]]


@pytest.mark.parametrize("name", ["FP8", "FP8_STATIC", "FP8_BLOCK"])
def test_best_finds_the_least_error_of_an_octave_of_fp8_scales(name):
    scheme = SCHEMES[name]
    rows = draw("student-t", (130, 128))
    importance = np.random.default_rng(4).lognormal(0, 2, 128).astype(np.float32)
    decoded = scheme.decode(scheme.encode(rows, importance), rows.shape).astype(np.float64)
    shared = {"FP8": 1, "FP8_STATIC": 130, "FP8_BLOCK": 128}[name]
    for start in range(0, 130, 13 if name == "FP8" else shared):
        part, exact = slice(start, start + shared), rows[start : start + shared].astype(np.float64)
        first = np.float32(np.abs(exact).max() / 448).view(np.int32) + 0xFFFF >> 16
        errors = []
        for bits in range(first, first + 128):
            scale = np.int32(bits << 16).view(np.float32).astype(np.float64)
            codes = torch.from_numpy(exact / scale).to(torch.float8_e4m3fn).double().numpy()
            errors.append((importance * (exact - codes * scale) ** 2).sum())
        assert (importance * (exact - decoded[part]) ** 2).sum() <= min(errors) * (1 + 1e-4)


def test_packing_of_every_width():
    rng = np.random.default_rng(0)
    for bits in range(1, 9):
        for n in (1, 7, 32, 37):
            codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (3, n)).astype(np.int8)
            words = pack(codes, bits)
            np.testing.assert_array_equal(unpack(words, bits, n), codes)
            np.testing.assert_array_equal(words, pack_to_int32(torch.from_numpy(codes), bits).numpy())


def extreme_rows(rng, shape):
    base = rng.standard_normal(shape)
    yield base * 1e-42
    yield base * 2e-30
    yield np.sign(base) * 3e38
    yield base * 10.0 ** rng.uniform(-38, 30, shape)
    yield np.where(rng.random(shape) < 0.01, 1e6, base * 1e-3)
    yield np.where(rng.random(shape) < 0.01, 1.0, 0.0)
    yield -np.abs(base)
    yield np.full(shape, 0.3)


def extreme_importance(rng, n_columns):
    one_hot = np.zeros(n_columns)
    one_hot[3] = 1
    yield None
    yield one_hot
    yield 10.0 ** rng.uniform(-30, 30, n_columns)
    yield np.full(n_columns, 3e38)
    yield np.full(n_columns, 1e-42)


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_extremes_stay_finite_and_are_never_worse_than_zero(name, effort):
    scheme, rng = SCHEMES[name], np.random.default_rng(7)
    for kind, drawn in enumerate(extreme_rows(rng, (5, 128))):
        rows = np.ascontiguousarray(drawn, np.float32)
        for importance in extreme_importance(rng, 128):
            weights = None if importance is None else importance.astype(np.float32)
            decoded = scheme.decode(scheme.encode(rows, weights, effort=effort), rows.shape)
            assert np.isfinite(decoded).all()
            if weights is None and kind > 1:
                exact = rows.astype(np.float64)
                assert ((decoded - exact) ** 2).sum() <= (exact**2).sum() * (1 + 1e-6)


@pytest.mark.parametrize("name", ["FP8_STATIC", "NVFP4"])
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_matrices_share_the_scale_of_their_stack(name, effort):
    scheme = SCHEMES[name]
    parts = [draw("student-t", (96, 128), 1), 3 * draw("gaussian", (40, 128), 2), np.zeros((8, 128), np.float32)]
    importance = np.random.default_rng(1).lognormal(0, 2, 128).astype(np.float32)
    shared = scheme.shared_scale(lambda: iter(parts), importance, effort=effort)
    whole = scheme.encode(np.concatenate(parts), importance, effort=effort)
    encoded = [scheme.encode(part, importance, effort=effort, global_scale=shared) for part in parts]
    for suffix in ("weight_scale", "weight_global_scale"):
        if suffix in whole and whole[suffix].size == 1:
            assert all(part[suffix] == whole[suffix] for part in encoded)
    decoded = [scheme.decode(tensors, part.shape) for tensors, part in zip(encoded, parts, strict=True)]
    assert np.array_equal(np.concatenate(decoded), scheme.decode(whole, (144, 128)))
    with pytest.raises(ConvertError, match="not a finite number"):
        scheme.shared_scale(lambda: [np.full((1, 128), np.nan, np.float32)])
