"""A GGUF that is quantized already: refused, or decoded row by row where that is asked for."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from bitwright.converter import convert
from bitwright.converter.cli import main
from bitwright.converter.job.build import build_job
from bitwright.converter.preparation import prepare
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import read_gguf
from bitwright.formats.registry import FORMATS
from tests.converter.source.quantized.coded_models import flat_importance

OPTIONS: dict[str, Any] = {"judge": "off", "threads": 1, "quiet": True}
# What needs no importance.
TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q5_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0"]


def write(path: Path, format_name: str, rows: np.ndarray) -> np.ndarray:
    """A file with this matrix in that format; what the gguf package decodes it to."""
    writer = gguf.GGUFWriter(path, "llama")
    data, ggml_type = FORMATS[format_name].encode(rows), GGMLQuantizationType[format_name]
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(data, ggml_type)


@pytest.mark.parametrize("format_name", TYPES)
def test_every_type_is_decoded_by_rows(format_name: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((70, 512)).astype(np.float32)
    expected = write(tmp_path / "m.gguf", format_name, rows)
    with pytest.raises(ConvertError, match=f"quantized already \\({format_name}\\)") as refused:
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert "--from-quantized" in refused.value.remedy
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"), from_quantized=True)
    name = "blk.0.ffn_up.weight"
    assert checkpoint.tensors[name].shape == (70, 512)
    np.testing.assert_allclose(checkpoint.read(name), expected, rtol=1e-6, atol=1e-7)
    assert np.array_equal(checkpoint.read(name, 33, 36), checkpoint.read(name)[33:36])
    assert np.array_equal(checkpoint.read_rows(name, np.array([69, 0])), checkpoint.read(name)[[69, 0]])


def test_second_scales_go_with_their_matrices(tiny, tmp_path: Path) -> None:
    """NVFP4: the tensors NAME.scale beside the matrices are part of them, and are written again as they were."""
    four, again, whole = (tmp_path / f"{name}.gguf" for name in ("four", "again", "whole"))
    importance: dict[str, Any] = {
        "imatrix": flat_importance(tiny("llama-256"), tmp_path),
        "protect_super_weights": "off",
    }
    convert(str(tiny("llama-256")), "uniform-8bit", overrides=["mlp_*=NVFP4"], output=four, **OPTIONS, **importance)
    convert(
        str(four), "uniform-8bit", overrides=["mlp_*=NVFP4"], output=again, from_quantized=True, **OPTIONS, **importance
    )
    before, after = ({t.name: t for t in read_gguf(path).tensors} for path in (four, again))
    assert before.keys() == after.keys() and "blk.0.ffn_up.scale" in before
    for name, tensor in before.items():
        assert np.array_equal(after[name].read(0, tensor.n_rows), tensor.read(0, tensor.n_rows)), name
    convert(str(four), "fp16-baseline", overrides=["*=F32"], output=whole, from_quantized=True, **OPTIONS)
    decoded = {t.name: t for t in read_gguf(whole).tensors}
    name = "blk.0.ffn_up"
    assert f"{name}.scale" not in decoded
    matrix, scale = before[f"{name}.weight"], before[f"{name}.scale"].decode(0, 1)[0, 0]
    assert np.array_equal(decoded[f"{name}.weight"].decode(0, matrix.n_rows), matrix.decode(0, matrix.n_rows) * scale)


@pytest.fixture(scope="module")
def eight_bits(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "eight.gguf"
    convert(str(tiny("llama-256")), "uniform-8bit", output=path, **OPTIONS)
    return path


def test_what_keeps_its_format_keeps_its_bytes(eight_bits: Path, tmp_path: Path) -> None:
    output = tmp_path / "again.gguf"
    convert(str(eight_bits), "uniform-8bit", output=output, from_quantized=True, **OPTIONS)
    before, after = ({t.name: t for t in read_gguf(path).tensors} for path in (eight_bits, output))
    assert before.keys() == after.keys()
    assert any(tensor.ggml_type.name == "Q8_0" for tensor in before.values())
    for name, tensor in before.items():
        assert after[name].ggml_type == tensor.ggml_type
        assert np.array_equal(after[name].read(0, tensor.n_rows), tensor.read(0, tensor.n_rows))


def test_another_format_is_made_of_what_was_decoded(eight_bits: Path, tmp_path: Path) -> None:
    output = tmp_path / "other.gguf"
    convert(str(eight_bits), "fp16-baseline", output=output, from_quantized=True, **OPTIONS)
    before, after = ({t.name: t for t in read_gguf(path).tensors} for path in (eight_bits, output))
    name = "blk.0.ffn_up.weight"
    assert after[name].ggml_type.name == "F16"
    whole = before[name].decode(0, before[name].n_rows)
    np.testing.assert_allclose(after[name].decode(0, after[name].n_rows), whole, rtol=1e-3, atol=1e-7)


def test_the_plan_says_what_it_costs(eight_bits: Path, tmp_path: Path) -> None:
    job = build_job(eight_bits, "uniform-8bit", from_quantized=True, output=tmp_path / "m.gguf")
    (note,) = (note for note in prepare(job).notes if "quantized already" in note)
    assert "Q8_0 (30 tensors)" in note and "add up" in note


def test_the_command_line(eight_bits: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["plan", "--profile", "uniform-8bit", str(eight_bits)])
    assert refused.exit_code == 1 and "--from-quantized" in refused.stderr
    planned = CliRunner().invoke(main, ["plan", "--profile", "uniform-8bit", "--from-quantized", str(eight_bits)])
    assert planned.exit_code == 0, planned.stderr
    assert "the source is quantized already" in " ".join(planned.output.split())
