"""A preset spends the bytes of its rules by measured sensitivity, unless nothing is to be measured or can be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bitwright import converter
from bitwright.converter.job.build import build_job
from bitwright.converter.preparation import prepare
from bitwright.formats.errors import ConvertError
from tests.tiny_architectures import ALL_TINY_MODELS
from tests.tiny_models import checkpoint

SHORT: dict[str, Any] = {
    "samples": 128,
    "sequence_length": 16,
    "calibration": "embedded",
    "threads": 1,
    "device": "cpu",
}


def plan_of(output: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((output.parent / f"{output.stem}.bitwright" / "plan.json").read_text())
    return plan


def test_the_default_is_measured_and_no_larger_than_its_rules(tiny, tmp_path, capsys):
    options = {"output": tmp_path / "model.gguf", **SHORT}
    before = prepare(build_job(str(tiny("llama")), **options))
    assert any("the plan of the rules alone" in note for note in before.notes) and before.plan.spent is None
    report = converter.convert(str(tiny("llama")), judge="off", **options)
    said = re.search(
        r"divergence: (\S+) by the rules of balanced-4bit, (\S+) with the same bytes", capsys.readouterr().err
    )
    plan = plan_of(tmp_path / "model.gguf")
    assert said is not None and float(said[1]) >= float(said[2]) == float(f"{plan['predicted_kld']:.4g}")
    assert report["profile"] == "balanced-4bit" and plan["budget"]["budget"]["as_rules"]
    assert sum(row["bytes"] for row in plan["tensors"]) <= before.plan.n_bytes
    assert report["recipe"]["budget.data_bytes"] == before.plan.n_bytes
    after = prepare(build_job(str(tiny("llama")), **options))
    assert after.plan.digest() == plan["plan_sha256"] and not any("alone" in note for note in after.notes)


def test_without_analysis_the_rules_decide_and_a_dry_run_is_exact(tiny, tmp_path):
    options = {"output": tmp_path / "model.gguf", "analysis": False, **SHORT}
    before = prepare(build_job(str(tiny("llama")), **options))
    report = converter.convert(str(tiny("llama")), judge="off", quiet=True, **options)
    assert report["plan_sha256"] == before.plan.digest() and report["artifact"]["bytes"] == before.files.n_bytes
    assert plan_of(tmp_path / "model.gguf")["predicted_kld"] is None
    assert not (tmp_path / "model.bitwright" / "sensitivity.safetensors").exists()


def test_a_model_without_gradients_is_planned_by_the_rules(tmp_path):
    model = checkpoint("qwen3-embedding", ALL_TINY_MODELS["qwen3-embedding"])
    prepared = prepare(build_job(str(model), output=tmp_path / "model.gguf", **SHORT))
    assert prepared.plan.spent is None
    assert any("the rules of balanced-4bit decide" in note and "embeds texts" in note for note in prepared.notes)


@pytest.mark.parametrize("options", [{"profile": "importance-tiers"}, {"target_bpw": 4.5}])
def test_what_only_a_measurement_decides_is_refused_without_one(tiny, options):
    with pytest.raises(ConvertError, match="no rules that decide without a measurement") as refused:
        prepare(build_job(str(tiny("llama")), analysis=False, **options, **SHORT))
    assert "--no-analysis" in refused.value.where
