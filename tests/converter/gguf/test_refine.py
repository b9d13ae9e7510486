"""Refinement: the arithmetic of the corrections, and a plan that is measured as a whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.calibration.control import Interrupted
from bitwright.calibration.sensitivity.table import load_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter.cli import main
from bitwright.converter.gguf.refine import corrections, parts_of, refine
from bitwright.converter.job.job import Job
from bitwright.converter.measure.evidence import evidence_of
from bitwright.converter.model.model_map import describe
from bitwright.converter.preparation import decide, survey
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.journal import read_lines
from bitwright.profiles.reading.schema import load_profile
from tests.converter.artifact.test_target import some_importance, some_sensitivity


def test_corrections_share_out_what_was_measured():
    predicted = {"a": 0.1, "b": 0.1, "c": 0.2, "small": 0.001}
    factors = corrections(predicted, 0.8, {"a": 0.6, "b": 0.7, "c": 0.3})
    cost = {part: factors[part] * predicted[part] for part in predicted}
    assert sum(cost.values()) == pytest.approx(0.8)
    assert cost["a"] / cost["b"] == pytest.approx(2) and cost["c"] / cost["a"] == pytest.approx(2.5)
    assert factors["small"] == pytest.approx(0.8 / (0.4 + 0.001))


def test_corrections_stay_within_bounds():
    predicted = {"a": 0.1, "b": 0.1}
    harmless = corrections(predicted, 0.5, {"a": 0.6, "b": 0.1})  # better without its damage than with it, by chance
    assert harmless["a"] / harmless["b"] == pytest.approx(0.25 / 2)
    nothing = corrections(predicted, 0.4, {"a": 0.5, "b": 0.5})
    assert nothing == {"a": pytest.approx(2), "b": pytest.approx(2)}


def test_every_matrix_is_in_one_part(tiny):
    model_map = describe(open_checkpoint(str(tiny("qwen3_moe"))))
    parts = parts_of(model_map)
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(t.name for t in model_map.tensors if t.quantizable)
    assert "embedding" in parts and "expert_down, third 1 of 3" in parts


@pytest.fixture
def measured(tiny, tmp_path):
    """A job with a tight target, and what it rests on; the losses of the table are far from true."""
    model = tiny("llama-256")
    job = Job(
        str(model),
        load_profile("budget"),
        output=tmp_path / "m.gguf",
        work_dir=tmp_path / "work",
        imatrix=some_importance(model, tmp_path / "imatrix.gguf"),
        sensitivity=some_sensitivity(model, tmp_path / "sensitivity.safetensors"),
        target_size=600_000,
        refine=2,
        effort="fast",
        sequence_length=32,
        protect_super_weights="off",
        judge="off",
        calibration="embedded",
    )
    surveyed = survey(job)
    surveyed = replace(surveyed, checkpoint=surveyed.checkpoint.with_weights())
    evidence = evidence_of(load_sensitivity(job.sensitivity), surveyed.checkpoint, surveyed.model_map)
    return surveyed, evidence, load_imatrix(job.imatrix)


def measured_divergences(work_dir) -> list[float]:
    return [entry["divergence"] for entry in read_lines(work_dir / "refinement" / "measured.jsonl")]


def test_the_best_plan_that_was_measured_stays(measured, tmp_path, monkeypatch):
    surveyed, evidence, importance = measured
    monkeypatch.setattr("bitwright.converter.job.kept.remove_tree", lambda directory: None)
    (tmp_path / "work").mkdir()
    plans = []

    def deciding(evidence):
        plans.append(decide(surveyed, evidence).plan)
        return decide(surveyed, evidence)

    refined = refine(surveyed, deciding, evidence, importance)
    record = json.loads((tmp_path / "work" / "corrections.json").read_text())
    assert record["divergence"] == min(measured_divergences(tmp_path / "work")[0], record["divergence"])
    assert len({plan.digest() for plan in plans}) > 1  # the corrections changed the plan
    assert decide(surveyed, refined).plan.digest() in {plan.digest() for plan in plans}
    total = sum(p.predicted_loss or 0.0 for p in decide(surveyed, refined).plan.tensors)
    assert np.isfinite(total) and total > 0


class Measured:
    """In the place of trials: what is measured is twice what the table says."""

    def __init__(self, evidence):
        self.evidence, self.plans = evidence, {}

    def divergence(self, prepared, exact=()):
        rows = [p for p in prepared.plan.tensors if p.tensor.name not in set(exact)]
        losses = (self.evidence.losses.get(p.tensor.name, {}).get(p.format, 0.0) for p in rows)
        found = 2 * sum(losses)
        if not exact:
            self.plans[prepared.plan.digest()] = found, prepared.files.n_bytes
        return found


@pytest.mark.parametrize("kld", [0.3, 3.0])
def test_for_a_divergence_the_smallest_plan_that_meets_it_stays(measured, tmp_path, monkeypatch, kld):
    surveyed, evidence, importance = measured
    losses = {n: {f: kld * loss for f, loss in of.items()} for n, of in evidence.losses.items()}
    total = sum(min(of.values()) for of in losses.values()) + sum(max(of.values()) for of in losses.values())
    goal = total / 4
    evidence = replace(evidence, losses=losses)
    profile = load_profile("budget").aiming_at(None, None, goal, "test")
    surveyed = replace(
        surveyed, job=replace(surveyed.job, target_size=None, target_kld=goal, profile=profile, refine=3)
    )
    trials = Measured(evidence)
    monkeypatch.setattr("bitwright.converter.gguf.refine._Trials", lambda *args: trials)
    (tmp_path / "work").mkdir()
    first = decide(surveyed, evidence).plan.digest()
    refined = refine(surveyed, lambda e: decide(surveyed, e), evidence, importance)
    chosen = decide(surveyed, refined).plan.digest()
    assert trials.plans[first][0] > goal  # the table promised too much
    good = {digest: n_bytes for digest, (found, n_bytes) in trials.plans.items() if found <= goal}
    assert chosen in good and good[chosen] == min(good.values())


def test_stopped_anywhere_it_ends_the_same(measured, tmp_path):
    surveyed, evidence, importance = measured
    results = []
    for name, patience in (("whole", None), ("parts", 3)):
        work_dir = tmp_path / name
        work_dir.mkdir()
        stops = 0
        while True:
            polls = iter(range(1 << 30 if patience is None else patience * 2**stops))
            try:
                run = replace(
                    surveyed,
                    job=replace(surveyed.job, refine=1),
                    work_dir=work_dir,
                    should_stop=lambda polls=polls: next(polls, None) is None,
                )
                refine(run, lambda e: decide(surveyed, e), evidence, importance)
                break
            except Interrupted:
                stops += 1
                with (work_dir / "refinement" / "measured.jsonl").open("a") as journal:
                    journal.write('{"trial": "cut sh')  # as a kill leaves it
        assert (stops > 1) == (patience is not None)
        results.append((work_dir / "corrections.json").read_bytes())
    assert results[0] == results[1]


def test_the_command_refines_and_says_so(measured, tmp_path):
    surveyed, _, _ = measured
    job = surveyed.job
    options = ["--target-size", "600K", "--imatrix", job.imatrix, "--sensitivity", job.sensitivity, "--effort", "fast"]
    options += ["--refine", 1, "--sequence-length", 32, "--judge", "off", "--protect-super-weights", "off"]
    options += ["--calibration", "embedded", "--output", job.output, job.model]

    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    dry = invoke("plan", *options)
    assert dry.exit_code == 0 and "this is the plan that --refine begins with" in " ".join(dry.stdout.split())
    done = invoke("--json", *options)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert "--refine=1" in report["arguments"] and "refine" in report["seconds"]
    assert job.output.stat().st_size <= 600_000
    assert json.loads(invoke("plan", "--json", *options).stdout)["plan_sha256"] == report["plan_sha256"]
    for wrong in (["--profile", "uniform-8bit", job.model], ["--profile", "budget", job.model]):
        refused = invoke("--refine", 1, *wrong)
        assert refused.exit_code == 1 and "--refine" in refused.stderr
