"""The sensitivity table's file: what is written is read again, and nothing else is."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.sensitivity.table import SensitivityTable, is_sensitivity, load_sensitivity, save_sensitivity
from bitwright.formats.errors import ConvertError

Q, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
KEY = "bitwright.sensitivity"


def table() -> SensitivityTable:
    random = np.random.default_rng(0)
    shapes = {Q: (1, 6, 4), EXPERTS: (3, 2, 4)}
    factors = FisherFactors(
        rows={name: random.random((n, rows)) for name, (n, rows, _) in shapes.items()},
        columns={name: random.random((n, columns)) for name, (n, _, columns) in shapes.items()},
        gradient_magnitude={Q: 1.5, EXPERTS: 0.25},
        activation_variance={Q: 3.0, EXPERTS: 0.0},
        weight_magnitude={Q: 0.1, EXPERTS: 0.2},
        model="org/model",
        revision=None,
        corpus="embedded",
        corpus_sha256="ab" * 32,
        samples=20,
        sequence_length=256,
        labels="sampled",
    )
    losses = {Q: {"Q4_K": 0.125, "Q2_K": 1 / 3}, EXPERTS: {"Q4_0": 0.0}}
    return SensitivityTable(losses, factors, {Q: 2, EXPERTS: 3}, "llama", "cd" * 32, "fast", "1.0+0123")


def saved(path: Path) -> Path:
    save_sensitivity(path / "table.safetensors", table())
    return path / "table.safetensors"


def test_what_is_saved_is_loaded(tmp_path):
    path, expected = saved(tmp_path), table()
    loaded = load_sensitivity(path)
    assert loaded.losses == expected.losses
    for name in (Q, EXPERTS):
        np.testing.assert_array_equal(loaded.factors.rows[name], expected.factors.rows[name])
        np.testing.assert_array_equal(loaded.factors.columns[name], expected.factors.columns[name])
    same = {"losses": {}, "factors": loaded.factors, "where": ""}
    assert replace(loaded, **same).__dict__ == replace(expected, **same).__dict__
    arrays = {"rows": {}, "columns": {}, "where": ""}
    assert replace(loaded.factors, **arrays).__dict__ == replace(expected.factors, **arrays).__dict__


def test_the_same_table_gives_the_same_bytes(tmp_path):
    first = saved(tmp_path).read_bytes()
    save_sensitivity(tmp_path / "again.safetensors", load_sensitivity(tmp_path / "table.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == first


def test_loss_of_a_format_that_is_not_there_is_an_error():
    assert table().loss(Q, "Q4_K") == 0.125
    with pytest.raises(ConvertError, match=r"IQ1_S.*it has Q4_K, Q2_K"):
        table().loss(Q, "IQ1_S")
    with pytest.raises(ConvertError, match="no such tensor"):
        table().loss("output.weight", "Q4_K")


@pytest.mark.parametrize("loss", [-1.0, np.nan, np.inf])
def test_impossible_losses_are_refused(loss):
    with pytest.raises(ConvertError, match="Q4_K is"):
        replace(table(), losses={Q: {"Q4_K": loss}})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    first = saved(tmp_path).read_bytes()
    with pytest.raises(AttributeError):
        save_sensitivity(tmp_path / "table.safetensors", None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]
    assert (tmp_path / "table.safetensors").read_bytes() == first
    with pytest.raises(ConvertError, match="cannot be written"):
        save_sensitivity(tmp_path / "absent" / "table.safetensors", table())


def test_is_sensitivity(tmp_path, tiny):
    assert is_sensitivity(saved(tmp_path))
    assert not is_sensitivity(next(tiny("llama").glob("*.safetensors")))
    assert not is_sensitivity(tmp_path / "absent.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    assert not is_sensitivity(tmp_path / "noise.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    path = saved(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConvertError, match="damaged"):
        load_sensitivity(path)


def test_other_files_are_refused(tmp_path, tiny):
    with pytest.raises(ConvertError, match="no such file"):
        load_sensitivity(tmp_path / "absent.safetensors")
    with pytest.raises(ConvertError, match="no sensitivity table"):
        load_sensitivity(next(tiny("llama").glob("*.safetensors")))
    with pytest.raises(ConvertError, match="damaged"):
        load_sensitivity(tmp_path)
    header = struct.pack("<Q", 1 << 62) + b"{}"
    (tmp_path / "hostile.safetensors").write_bytes(header)
    with pytest.raises(ConvertError, match="damaged"):
        load_sensitivity(tmp_path / "hostile.safetensors")


def tampered(path: Path, change) -> Path:
    """The file with its arrays and its description changed."""
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[KEY])
    text = change(arrays, header)
    save_file(arrays, path, {KEY: json.dumps(header) if text is None else text})
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda arrays, header: header.update(version=1), "of version 1"),
        (lambda arrays, header: header.pop("version"), "of version None"),
        (lambda arrays, header: "[1]", "no JSON object"),
        (lambda arrays, header: "{", "no JSON"),
        (lambda arrays, header: "[" * 100_000, "no JSON"),
        (lambda arrays, header: header.update(tensors=[Q]), "sampled_rows"),
        (lambda arrays, header: header.update(tensors=[Q, Q]), "twice"),
        (lambda arrays, header: header.update(tensors=[Q, 7]), "no list of names"),
        (lambda arrays, header: header.update(formats=[]), "no list of names"),
        (lambda arrays, header: header.update(sampled_rows=[True, 2]), "sampled_rows"),
        (lambda arrays, header: header.update(effort="slow"), "unknown"),
        (lambda arrays, header: header.update(architecture=None), "architecture is None"),
        (lambda arrays, header: header.pop("factors"), "identity of its factors"),
        (lambda arrays, header: header["factors"].update(samples="many"), "samples is 'many'"),
        (lambda arrays, header: header["factors"].update(samples=True), "samples is True"),
        (lambda arrays, header: header["factors"].update(labels="wrong"), "'wrong'"),
        (lambda arrays, header: arrays.pop("losses"), "lacks float64 values of losses"),
        (lambda arrays, header: arrays.update(losses=arrays["losses"].astype("f4")), "float64 values of losses"),
        (lambda arrays, header: arrays.update(losses=-arrays["losses"]), "the loss of"),
        (lambda arrays, header: arrays["losses"].fill(np.nan), "lacks losses"),
        (lambda arrays, header: arrays.pop(f"rows/{Q}"), "rows/blk.0.attn_q"),
        (lambda arrays, header: arrays.update({f"rows/{Q}": np.ones((2, 6))}), "do not agree"),
        (lambda arrays, header: arrays.update({f"rows/{Q}": np.ones(6)}), "do not agree"),
        (lambda arrays, header: arrays.update({f"columns/{Q}": np.full((1, 4), np.inf)}), "not finite"),
        (lambda arrays, header: arrays.update({f"columns/{Q}": np.full((1, 4), -1.0)}), "negative"),
        (lambda arrays, header: arrays.update(more=np.ones(1)), "'more' belong to no tensor"),
    ],
)
def test_tampered_files_are_refused(tmp_path, change, problem):
    with pytest.raises(ConvertError, match=problem) as caught:
        load_sensitivity(tampered(saved(tmp_path), lambda arrays, header: _text(change(arrays, header))))
    assert "table.safetensors" in caught.value.where


def _text(result) -> str | None:
    return result if isinstance(result, str) and result[:1] in "[{" else None
