"""What a job is said to take: by rates of earlier runs, or measured now, and never a byte of the result."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from bitwright.converter.forecast import probe
from bitwright.converter.forecast.rates import RateKeeper, Rates
from bitwright.converter.forecast.work import Work, active_weights, work_of
from bitwright.converter.job.build import build_job
from bitwright.converter.job.cache import RATES_FILE
from bitwright.converter.job.progress import Clock, Progress
from bitwright.converter.outlook import outlook
from bitwright.converter.preparation import forecast, prepare, survey
from bitwright.converter.record.forecast import Forecast, Step, Steps, seconds_text
from tests.converter.commands import PLAIN, convert, refused

SHORT = {"calibration": "embedded", "samples": 128, "sequence_length": 16}


def rates(tmp_path, machine="here") -> Rates:
    return Rates(tmp_path / RATES_FILE, machine)


def test_the_run_that_is_nearest_in_size_tells_the_rate(tmp_path):
    for amount, seconds in ((100.0, 1.0), (1000.0, 5.0), (1000.0, 8.0)):
        rates(tmp_path).keep(Work("verify", amount), seconds)
    known = rates(tmp_path)
    assert known.seconds(Work("verify", 200.0)) == pytest.approx(2.0)
    assert known.seconds(Work("verify", 2000.0)) == pytest.approx(16.0), "the latest of two"
    assert known.seconds(Work("verify", 1e6)) is None, "a run that is so much smaller says little"
    assert known.seconds(Work("verify", 200.0, "safetensors")) is None and known.seconds(Work("encode", None)) is None
    assert rates(tmp_path, "elsewhere").seconds(Work("verify", 200.0)) is None


def test_damaged_rates_are_none_and_many_are_shortened(tmp_path, monkeypatch):
    path = tmp_path / RATES_FILE
    rates(tmp_path).keep(Work("verify", 100.0), 1.0)
    path.write_bytes(path.read_bytes() + b'{"stage": "verify", "amount": "x"}\n\xff\xfe')
    assert rates(tmp_path).seconds(Work("verify", 100.0)) == 1.0
    monkeypatch.setattr("bitwright.converter.forecast.rates._MOST_LINES", 8)
    for n in range(20):
        rates(tmp_path).keep(Work("verify", 100.0), float(n + 1))
    assert len(path.read_bytes().splitlines()) <= 9 and rates(tmp_path).seconds(Work("verify", 100.0)) == 20.0
    path.unlink()
    path.mkdir()
    rates(tmp_path).keep(Work("verify", 100.0), 1.0)
    assert rates(tmp_path).seconds(Work("verify", 100.0)) is None


def test_what_was_continued_or_found_is_no_rate(tmp_path):
    work = Work("verify", 100.0)
    for kept, continued, found in ((True, False, False), (False, True, False), (False, False, True)):
        keeper = RateKeeper(None if continued else rates(tmp_path))
        keeper.expect([work], {})
        progress = Progress(quiet=True)
        with Clock(progress, keeper)("verify"):
            if found:
                progress.reuse()
        assert (rates(tmp_path).seconds(work) is not None) == kept
        (tmp_path / RATES_FILE).unlink(missing_ok=True)


def test_a_second_conversion_knows_the_rates_of_the_first_and_has_its_bytes(tiny, tmp_path, cache_dir):
    files = []
    for name in ("warm", "first", "second", "without"):
        cache = ["--cache", "off"] if name == "without" else []
        options = [*PLAIN, *cache, "--events", tmp_path / name, "--output", tmp_path / f"{name}.gguf"]
        assert convert(*options, tiny("llama-256")).exit_code == 0
        files.append((tmp_path / f"{name}.gguf").read_bytes())
    assert len(set(files)) == 1, "no forecast decides a byte"
    told = {name: _steps(tmp_path / name) for name in ("second", "without")}
    assert {step["basis"] for step in told["second"].values()} == {"kept"}
    assert set(told["second"]) == {"encode", "verify"} and told["second"]["verify"]["seconds"] > 0
    assert told["without"]["encode"]["basis"] == "measured" and told["without"]["encode"]["at_least"]
    assert told["without"]["verify"]["seconds"] is None


def _steps(events) -> dict[str, dict]:
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    (forecast,) = (line for line in lines if line["event"] == "forecast")
    return {step["stage"]: step for step in forecast["steps"]}


def test_rates_decide_the_forecast(tiny, tmp_path, monkeypatch):
    """Twice as long for a unit is twice as long for the whole; nothing else is in it."""
    monkeypatch.setattr("bitwright.converter.forecast.rates._COMPARABLE", float("inf"))
    job = build_job(tiny("llama"), output=tmp_path / "m.gguf", analysis=False, **SHORT)
    prepared, total = prepare(job), []
    works = list(work_of(prepared.run, prepared.plan, False, True))
    assert {"calibrate", "encode", "verify", "quality", "guard"} <= {work.stage for work in works}
    for seconds in (1.0, 2.0):
        known = Rates(tmp_path / f"{seconds}", "here")
        for work in works:
            known.keep(work, seconds)
        foreseen = forecast(prepared.run, prepared, Rates(tmp_path / f"{seconds}", "here")).forecast
        assert foreseen.is_complete and {step.basis for step in foreseen.steps} == {"kept"}
        total.append(foreseen.seconds)
    assert total[0] == pytest.approx(len(works)) and total[1] == pytest.approx(2 * len(works))


def test_the_memory_is_what_is_refused_without(tiny, tmp_path, monkeypatch):
    options = [*PLAIN[:2], "--judge", "fast", "--output", tmp_path / "m.gguf", tiny("llama")]
    needed = outlook(build_job(tiny("llama"), "uniform-8bit", judge="fast")).forecast.memory_bytes
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
    assert "of memory are available" in refused(*options)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed))
    assert convert(*options, "--dry-run").exit_code == 0


def test_a_token_meets_the_experts_that_it_is_sent_to(tiny, tmp_path):
    model_map = survey(build_job(tiny("qwen3_moe"), "uniform-8bit", output=tmp_path / "m.gguf")).model_map
    own = model_map.architecture
    used, of = (model_map.metadata[f"{own}.expert_{key}"].value for key in ("used_count", "count"))
    experts = sum(t.n_weights for t in model_map.tensors if t.role.startswith("expert_"))
    others = sum(t.n_weights for t in model_map.tensors if t.quantizable) - experts
    assert used < of and active_weights(model_map) == pytest.approx(others + experts * used / of, abs=1)


def test_what_is_measured_before_the_plan_is_in_the_forecast(tiny):
    options = {"target_bpw": 4.0, **SHORT}
    seen = outlook(build_job(tiny("llama-256"), **options))
    steps = {step.stage: step for step in seen.forecast.steps}
    assert list(steps)[:2] == ["calibrate", "analyse"] and steps["encode"].seconds is None
    assert steps["calibrate"].basis == "measured" and not seen.forecast.is_complete
    ruled = outlook(build_job(tiny("llama-256"), **SHORT)).forecast
    assert next(step for step in ruled.steps if step.stage == "encode").basis == "measured"


def test_a_plan_is_the_same_whatever_it_is_forecast(tiny, tmp_path):
    job = build_job(tiny("llama"), "uniform-8bit", output=tmp_path / "m.gguf")
    before = prepare(job).to_dict()
    assert {key: value for key, value in outlook(job).to_dict().items() if key != "forecast"} == before
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_is_the_shortest_of_several_tries(monkeypatch):
    """By a clock that goes on as the work takes."""
    tries, now = [4.0, 1.0, 2.0, 0.5], [0.0]
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for enough, shortest, left in ((6.5, 1.0, 1), (0.0, 0.5, 0)):
        monkeypatch.setattr(probe, "_ENOUGH_SECONDS", enough)
        assert probe._shortest(lambda: now.append(now.pop() + tries.pop(0))) == shortest
        assert len(tries) == left


def test_steps_count_down():
    steps = Steps([Step("calibrate", 600.0), Step("encode", 120.0), Step("verify"), Step("guard", 20.0, at_least=True)])
    steps.begin("plan")
    assert steps.text() == ""
    steps.begin("calibrate")
    assert steps.text() == "Step 1 of 4 - more than 12 min left"
    assert steps.text(elapsed=540.0, least=400.0) == "Step 1 of 4 - more than 9 min left"
    steps.begin("verify")
    assert steps.text() == "Step 3 of 4 - more than 20 s left" and steps.left(0.0, 30.0) == (50.0, True)
    steps.begin("guard")
    assert steps.text(elapsed=100.0) == "Step 4 of 4"
    steps.begin("calibrate")
    assert steps.text() == "", "what was done once is looked at again"
    whole = Steps([Step("encode", 720.0), Step("verify", 60.0)])
    whole.begin("encode")
    assert whole.text() == "Step 1 of 2 - 13 min left"


def test_a_better_forecast_amid_the_job_leaves_what_is_done():
    steps = Steps([Step("calibrate", 60.0), Step("analyse", 60.0), Step("adapt"), Step("encode")])
    steps.begin("calibrate")
    steps.begin("analyse")
    steps.expect([Step("calibrate", 60.0), Step("encode", 30.0), Step("verify", 5.0)])
    steps.begin("encode")
    assert steps.text() == "Step 3 of 4 - 35 s left"


def test_a_forecast_says_what_it_rests_on():
    known = Forecast((Step("calibrate", 0.0, basis="cache"), Step("encode", 200.0, basis="kept")), 1 << 30, 1 << 20, 0)
    assert known.lines()[0] == "forecast: about 3 min" and "calibrate cached" in known.lines()[1]
    assert "rates of earlier runs on this machine" in known.lines()[2] and known.to_dict()["complete"]
    partly = replace(known, steps=(Step("encode", 200.0, True, "measured"), Step("guard")), download_bytes=1 << 30)
    text = "\n".join(partly.lines())
    assert "more than 3 min" in text and "guard ?" in text and "one layer measured now" in text
    assert "memory 1.00 GiB at most, disk 1.00 MiB, download 1.00 GiB" in text
    assert "how long it takes is not known" in replace(known, steps=(Step("guard"),)).lines()[0]
    assert [seconds_text(s) for s in (0.2, 89, 600, 7800, 90000)] == ["1 s", "89 s", "10 min", "2 h 10 min", "25 h"]


@pytest.mark.parametrize("profile", ["w4a16", "smoothquant-w8a8", "fp8", "nvfp4-vllm"])
def test_a_directory_is_foreseen_too(tiny, profile):
    """With error feedback, which its schemes take otherwise than formats do."""
    foreseen = outlook(build_job(tiny("llama-256"), profile, error_feedback="quick", **SHORT)).forecast
    steps = {step.stage: step for step in foreseen.steps}
    assert steps["encode"].basis == "measured" and steps["encode"].seconds > 0 and "verify" in steps
