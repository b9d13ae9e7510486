"""What the IQ formats have of their own: grids, lists of candidates, even signs, and how near the search comes."""

import hashlib

import gguf
import numpy as np
import pytest

from bitwright.formats.codebooks import iq2, iq3
from bitwright.formats.codebooks.grids import codebook, points
from bitwright.formats.codebooks.packing import EVEN_BYTES, pack_signs_and_scales, unpack_signs_and_scales
from bitwright.formats.codebooks.search import search_efforts
from bitwright.formats.registry import FORMATS
from tests.formats.draws import typical, weighted_nmse

# sha256 of the points, as int8 [n_points, n_dims] with IQ1's coordinates times 8: other points are another format.
GRIDS = {
    "IQ3_S": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
    "IQ3_XXS": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "IQ2_S": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "IQ2_XS": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "IQ2_XXS": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "IQ1_M": "d79eebc595d3637275ee77c8e0eaf68c6f721ee60fe189122cd950f6f3ae48e2",
    "IQ1_S": "ce14cc6490491fa13837d2415d10747e26f509cfc9bed7e5f5d66e68fd7c041f",
}
# sha256 of the lists of 32 candidates, uint16 [n_cells, 32]: other lists are other bytes of every tensor encoded.
LISTS = {
    "IQ3_S": "44ebd1ca379347405d8848ed80002ea7d2317988cca1e9277d9e5cfe2cb7971d",
    "IQ3_XXS": "4fe756e4fca31db4e088638ac6ce8c27225eef442ddc15ee0ee747703c7958b5",
    "IQ2_S": "c7268e0af01a2290eb31c50dc4e5337b45b56643354651e800c4250b583fbb23",
    "IQ2_XS": "432839709906237e20ed6c9ca64a8a71a74088fba2df9204e364136ab6896685",
    "IQ2_XXS": "1305d72cc05bf4fe0741d8f565d9e74c3641b234c10f7df4acd71ae4152d6872",
    "IQ1_M": "453a75516ec9ba3a8890eba4d8d0936fe94489cf7e7cb4696dfe51a37445e818",
    "IQ1_S": "06378f39e2b4cc385d8ad911aa80e0a68e03148475ce419d6b0a69cbf61c9954",
}


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", GRIDS)
def test_grids_and_lists_of_candidates_stay_what_they_are(name):
    assert sha256(points(name)) == GRIDS[name]
    assert sha256(codebook(name, 32).indices.astype("<u2")) == LISTS[name]


@pytest.mark.parametrize("name", GRIDS)
def test_candidates_of_a_cell_are_the_points_nearest_to_its_centre(name):
    book = codebook(name, 16)
    bottom, spacing, top = book.levels
    n_dims = book.points.shape[1]
    coordinates = (book.points - bottom) / spacing
    for cell in np.random.default_rng(0).integers(0, len(book.indices), 50):
        centre = cell // (top + 1) ** np.arange(n_dims) % (top + 1)
        distances = ((coordinates - centre) ** 2).sum(axis=1)
        # Nearest first, but for the rounding of distances to sixteenths, once in each half.
        assert (np.diff(distances[book.indices[cell]]) > -2 / 16).all()
        assert len(set(book.indices[cell])) == 16
        assert distances[book.indices[cell]].max() <= np.sort(distances)[15] + 2 / 16
        np.testing.assert_array_equal(book.candidates[cell].T, book.points[book.indices[cell]])


def test_even_bytes_are_ggmls():
    np.testing.assert_array_equal(EVEN_BYTES, np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8))


def test_signs_and_scales_come_back():
    rng = np.random.default_rng(1)
    signs, scales = EVEN_BYTES[rng.integers(0, 128, (5, 32))], rng.integers(0, 16, (5, 8), np.uint8)
    unpacked_signs, unpacked_scales = unpack_signs_and_scales(pack_signs_and_scales(signs, scales))
    np.testing.assert_array_equal(unpacked_signs, signs)
    np.testing.assert_array_equal(unpacked_scales, scales)


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", *GRIDS])
def test_weights_that_the_format_can_hold_come_back(name):
    block_format = FORMATS[name]
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (16, block_format.row_bytes(1024)), np.uint8)
    blocks = data.reshape(-1, block_format.type_size)
    if name == "IQ1_M":  # float16 0.25 = 0x3400, four bits at a time above the scales
        blocks[:, 49::2] = blocks[:, 49::2] & 0x0F | np.array([0x00, 0x00, 0x40, 0x30], np.uint8)
    else:
        blocks[:, :2] = np.frombuffer(np.float16(0.25).tobytes(), np.uint8)
    rows, importance = block_format.decode(data), rng.lognormal(0, 1, 1024).astype(np.float32)
    decoded = block_format.decode(block_format.encode(rows, importance))
    came_back = (decoded == rows).reshape(len(blocks), -1).all(axis=1)
    assert came_back.mean() >= 0.95
    assert weighted_nmse(rows, decoded, importance) < 1e-5


@pytest.mark.parametrize(
    ("name", "efforts", "exhaustive"),
    [
        ("IQ3_XXS", iq3._IQ3_XXS_EFFORTS, search_efforts(iq3.IQ3_XXS_LAYOUT, 62, 3, (256, 16), n_rounds=3)),
        ("IQ2_XXS", iq2._IQ2_XXS_EFFORTS, search_efforts(iq2.IQ2_XXS_LAYOUT, 43, 6, (256, 16), n_rounds=3)),
    ],
)
def test_looking_at_every_point_would_gain_little(name, efforts, exhaustive, monkeypatch):
    rows, importance = typical(seed=11)
    block_format = FORMATS[name]
    ours = weighted_nmse(rows, block_format.decode(block_format.encode(rows, importance)), importance)
    monkeypatch.setitem(efforts, "best", exhaustive["best"])
    bound = weighted_nmse(rows, block_format.decode(block_format.encode(rows, importance)), importance)
    assert bound <= ours <= 1.005 * bound


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
@pytest.mark.parametrize("effort", ["best", "fast"])
def test_important_weights_keep_their_sign_where_parity_takes_one(name, effort):
    """Seven weights of eight matter; an odd number of minus signs must cost the eighth."""
    rows = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    rows = np.copysign(np.maximum(np.abs(rows), 0.5), rows).astype(np.float32)
    importance = np.tile(np.array([1, 1, 1, 1, 1, 1, 1, 1e-6], np.float32), 32)
    decoded = FORMATS[name].decode(FORMATS[name].encode(rows, importance, effort))
    matters = np.arange(256) % 8 != 7
    np.testing.assert_array_equal(np.signbit(decoded[:, matters]), np.signbit(rows[:, matters]))
