"""Checkpoints of frontier shapes, as files of holes: planned to the byte from their headers."""

import json
from math import prod
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from bitwright.converter.job.build import build_job
from bitwright.converter.preparation import prepare
from scripts.frontier_models import write_frontier_model
from tests import tiny_models

# Of what the model computes with, as its makers count.
PARAMETERS = {"deepseek-v3": 671_026_419_200, "gpt-oss-120b": 116_829_156_672}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_plan_counts_every_parameter_and_every_byte(tmp_path: Path, name: str) -> None:
    tiny_models.build("llama", tmp_path / "tiny")
    write_frontier_model(name, tmp_path / name, tmp_path / "tiny")
    job = build_job(model=str(tmp_path / name), profile="uniform-8bit", judge="off", output=tmp_path / "out.gguf")
    prepared = prepare(job)
    rows = prepared.plan.tensors
    data = 0
    for row in rows:
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[row.format]]
        data += -(-prod(row.tensor.shape) // block * n_bytes // 32) * 32
    said = prepared.to_dict()["bytes"]
    header = said - data
    assert 0 < header < 32 << 20 and said % 32 == 0
    computed = sum(row.tensor.n_weights for row in rows if row.tensor.sources)
    assert computed == PARAMETERS[name]
    assert not list(tmp_path.glob("out*"))


def test_the_whole_of_a_release_is_described(tmp_path: Path) -> None:
    """Every stored value belongs to a tensor of the artifact, or is named as left out."""
    tiny_models.build("llama", tmp_path / "tiny")
    write_frontier_model("gpt-oss-120b", tmp_path / "model", tmp_path / "tiny", n_layers=1)
    job = build_job(model=str(tmp_path / "model"), profile="uniform-8bit", judge="off", output=tmp_path / "out.gguf")
    prepared = prepare(job)
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    codes = sum(prod(entry["shape"]) for name, entry in header.items() if name.endswith("_blocks"))
    values = sum(prod(entry["shape"]) for entry in header.values() if entry["dtype"] == "BF16")
    assert sum(row.tensor.n_weights for row in prepared.plan.tensors if row.tensor.sources) == 2 * codes + values
