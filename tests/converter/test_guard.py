"""The coherence guard: the same findings by either runtime and after interruptions; verdicts and their advice."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import converter.generate
from calibration.control import Interrupted, never, silent
from converter.child import RuntimeFailed
from converter.cli import main
from converter.generate import generate_by_llama_cpp
from converter.gguf_target import GgufTarget
from converter.guard import N_TOKENS, PROMPTS, guard, prompt_tokens, verdict
from converter.job import Job
from converter.llama_cpp import LlamaCpp
from converter.model_map import describe
from converter.progress import Progress
from converter.source import open_checkpoint
from converter.target import Candidate
from converter.verdict import EXIT_CODE, better_recipe, overall, warning
from converter.verify import DecodedArtifact
from profiles.assign import assign
from profiles.schema import load_profile, parse_profile
from tests import tiny_models
from tests.converter.f32_file import write_f32


@pytest.fixture(scope="module")
def f32(tiny, tmp_path_factory) -> Path:
    """The tiny llama as a GGUF in F32: what it generates is what the source generates."""
    path = tmp_path_factory.mktemp("f32") / "m.gguf"
    write_f32(tiny("llama-256"), path)
    return path


@pytest.fixture
def few_prompts(monkeypatch) -> None:
    monkeypatch.setattr("converter.guard.PROMPTS", PROMPTS[:3])
    monkeypatch.setattr("converter.guard.HELD_OUT_PROMPTS", 4)


def run_guard(model: Path, artifact: Path, work_dir: Path, should_stop=never) -> dict:
    checkpoint = open_checkpoint(str(model))
    model_map = describe(checkpoint)
    work_dir.mkdir(exist_ok=True)
    return guard(
        checkpoint,
        model_map,
        Candidate(DecodedArtifact([artifact], model_map), artifact=artifact),
        work_dir,
        held_out="embedded",
        seed=0,
        device="cpu",
        threads=2,
        progress=Progress(quiet=True),
        should_stop=should_stop,
    )


def test_an_exact_artifact_writes_what_the_source_writes(tiny, f32, tmp_path, few_prompts):
    found = run_guard(tiny("llama-256"), f32, tmp_path)
    assert found["verdict"] == "coherent" and found["runtime"].startswith("llama.cpp") and not found["runtime_note"]
    assert found["greedy_agreement"] == 1
    for row in found["prompts"]:
        assert row["text"] == row["agreed_text"] == row["source_text"] and row["agreed"] == row["tokens"] > 0
        assert row["entropy"] == pytest.approx(row["source_entropy"], abs=1e-2)
        assert row["surprise"] == pytest.approx(row["source_surprise"], abs=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coherence.json", "seals.jsonl"]


def test_without_llama_cpp_the_model_itself_generates(tiny, f32, tmp_path, few_prompts, monkeypatch):
    with_runtime = run_guard(tiny("llama-256"), f32, tmp_path / "with")
    monkeypatch.setattr(converter.generate, "installed", lambda: False)
    without = run_guard(tiny("llama-256"), f32, tmp_path / "without")
    assert "xllamacpp is not installed" in without["runtime_note"]["unavailable"]
    assert without["runtime"].startswith("transformers") and without["verdict"] == "coherent"
    assert [row["text"] for row in without["prompts"]] == [row["text"] for row in with_runtime["prompts"]]
    assert without["greedy_agreement"] == with_runtime["greedy_agreement"] == 1


def test_interrupted_anywhere_it_ends_with_the_same_findings(tiny, f32, tmp_path, few_prompts):
    whole = run_guard(tiny("llama-256"), f32, tmp_path / "whole")
    stops, patience = 0, 2.0
    while True:
        polls = iter(range(int(patience)))
        try:  # a little further each time
            found = run_guard(tiny("llama-256"), f32, tmp_path / "work", lambda polls=polls: next(polls, None) is None)
            break
        except Interrupted:
            stops, patience = stops + 1, patience * 2
    assert stops > 3
    assert found == whole


def generate(artifact: Path, prompts: list[list[int]], **options):
    options = {"threads": 2, "progress": silent, "should_stop": never} | options
    return generate_by_llama_cpp(artifact, prompts, 8, **options)


def test_the_child_generates_what_the_binding_does(f32):
    prompts = [tiny_models.tokens("llama-256")[:n] for n in (1, 5, 9, 30, 2)]
    found = generate(f32, prompts)
    with LlamaCpp(f32, n_threads=1) as model:
        expected = [model.generate(prompt, 8) for prompt in prompts]
        assert found.end_tokens == model.end_tokens
        logits = model.logits(prompts[1])[-1].astype(np.float64)
    assert [[t for t in g.tokens if t not in found.end_tokens] for g in found.generations] == expected
    p = np.exp(logits - logits.max())
    p /= p.sum()
    assert found.generations[1].entropies[0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
    assert found.generations == generate(f32, prompts, threads=1).generations


def test_an_artifact_that_llama_cpp_cannot_run_is_a_finding(tiny, f32, tmp_path, few_prompts):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(f32.read_bytes()[:-100_000])
    with pytest.raises(RuntimeFailed, match="cannot load"):
        generate(broken, [[5]])

    def dies(*_, **__):
        raise RuntimeFailed("llama.cpp was ended by SIGABRT: GGML_ASSERT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("converter.guard.generate_by_llama_cpp", dies)
        found = run_guard(tiny("llama-256"), f32, tmp_path / "work")
    assert found["verdict"] == "severe" and found["greedy_agreement"] == 1
    report = {"verdict": "severe", "quality": None, "coherence": found, "agreement": None, "better": "convert x"}
    assert "llama.cpp does not run the artifact: llama.cpp was ended by SIGABRT" in warning(report)


def test_a_stopped_child_leaves_nothing_behind(f32):
    with pytest.raises(Interrupted):
        generate(f32, [[5, 6]] * 20, should_stop=lambda: True)


def test_prompts_are_asked_as_the_model_is_used(smollm2, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (tokens,), note = prompt_tokens(tokenizer, ["Why?"])
    text = tokenizer.decode(tokens)
    assert not note
    assert text.startswith("<|im_start|>") and text.endswith("<|im_start|>assistant\n") and "Why?" in text
    bare = AutoTokenizer.from_pretrained(tiny("llama-tied"))
    assert prompt_tokens(bare, ["Why?"]) == ([bare("Why?")["input_ids"]], "")
    bare.chat_template = "{{ raise_exception('system message first') }}"
    plain, note = prompt_tokens(bare, ["Why?"])
    assert plain == [bare("Why?")["input_ids"]] and "TemplateError: system message first" in note


def rows(*kinds: str) -> list[dict]:
    found = [
        {"prompt": "p", "text": "SSSS", "problems": [{"kind": kind, "detail": ""}] if kind else []} for kind in kinds
    ]
    return found + [{"prompt": "p", "text": "fine", "problems": []}] * (8 - len(found))


@pytest.mark.parametrize(
    ("found", "note", "not_finite", "expected"),
    [
        (rows(), {}, 0, "coherent"),
        (rows(), {"unavailable": "no xllamacpp"}, 0, "coherent"),
        (rows("loop"), {}, 0, "noticeable"),
        (rows("loop", "flat"), {}, 0, "severe"),
        (rows("not finite"), {}, 0, "severe"),
        (rows(*["incoherent"] * 6), {}, 0, "failed"),
        (rows(), {"failed": "SIGABRT"}, 0, "severe"),
        (rows(), {}, 1, "severe"),
    ],
)
def test_verdicts(found, note, not_finite, expected):
    assert verdict(found, note, not_finite) == expected


def test_held_out_text_that_ends_in_overflow_is_no_mere_difference(tiny, f32, tmp_path, few_prompts, monkeypatch):
    def one_overflows(*arguments, **options):
        found = generate_by_llama_cpp(*arguments, **options)
        found.generations[-1] = replace(found.generations[-1], finite=False)
        return found

    monkeypatch.setattr("converter.guard.generate_by_llama_cpp", one_overflows)
    found = run_guard(tiny("llama-256"), f32, tmp_path)
    assert found["verdict"] == "severe" and found["held_out_not_finite"] == 1 and found["greedy_agreement"] == 0.75
    text = warning({"verdict": "severe", "quality": None, "coherence": found, "agreement": None, "better": None})
    assert "1 of 4 continuations of held-out text end where the predictions are not finite" in text


def test_the_worse_of_both_measures_counts_and_is_never_averaged():
    failed, coherent = {"verdict": "failed"}, {"verdict": "coherent"}
    assert overall({"mean_kld": 0.01}, failed, None) == "failed"
    assert overall({"mean_kld": 3.0}, coherent, None) == "severe"
    assert overall({"mean_kld": 0.6}, coherent, None) == "noticeable"
    assert overall({"mean_kld": 0.01}, coherent, {"verdict": "differs"}) == "coherent"
    assert overall({"mean_kld": 0.01}, coherent, {"verdict": "disagrees"}) == "severe"
    assert overall({"mean_kld": None}, coherent, None) == "failed"
    assert overall(None, None, {"verdict": None}) is None
    coherence = {"verdict": "failed", "prompts": rows(*["loop"] * 7), "runtime_note": {}}
    coherence["held_out_not_finite"] = 0
    text = warning({"verdict": "failed", "quality": None, "coherence": coherence, "agreement": None, "better": None})
    assert "failed: it no longer writes text" in text and "7 of 8 answers" in text and "'SSSS'" in text


def test_the_better_recipe_is_a_command_that_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    model_map = describe(checkpoint)
    low = parse_profile('description = ""\ngood_for = ""\nbase = "IQ1_S"', "low", "low.toml")
    job = Job(str(tiny("llama-256")), low, output=tmp_path / "tiny-LOW.gguf", work_dir=tmp_path / "work")
    plan = assign(low, model_map)
    assert better_recipe(job, lambda profile: assign(profile, model_map), plan, tmp_path, "coherent") is None
    sizes = []
    for degree in ("noticeable", "severe", "failed"):
        command = better_recipe(job, lambda profile: assign(profile, model_map), plan, tmp_path, degree)
        profile = load_profile(shlex.split(command)[2])
        sizes.append(assign(profile, model_map).n_bytes / plan.n_bytes)
    assert 1.1 <= sizes[0] <= sizes[1] <= sizes[2] and sizes[2] >= 1.5
    program, *arguments = shlex.split(command)
    assert program == "convert"
    done = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] != str(job.output)
    said = replace(job, calibration="a text.txt", pre_tokenizer="qwen2", shard_bytes=200_000)
    again = shlex.split(better_recipe(said, lambda profile: assign(profile, model_map), plan, tmp_path, "severe"))
    for pair in (["--calibration", "a text.txt"], ["--pre-tokenizer", "qwen2"], ["--split-size", "200000"]):
        assert again[again.index(pair[0]) :][:2] == pair
    finest = load_profile("fp16-baseline")
    assert (
        better_recipe(job, lambda profile: assign(profile, model_map), assign(finest, model_map), tmp_path, "severe")
        is None
    )


class Overflowing:
    """An artifact's weights of which one row of the output head is so large that every prediction overflows."""

    def __init__(self, weights: DecodedArtifact):
        self._weights, self.tensors = weights, weights.tensors

    def read(self, name: str) -> np.ndarray:
        values = self._weights.read(name)
        if name == "lm_head.weight":
            values[7] = np.inf
        return values


def test_an_artifact_whose_predictions_overflow_has_failed_and_says_so(tiny, tmp_path, monkeypatch):
    """From the measurement to the report, the page, the warning and the exit code: nothing stops on the way."""
    whole = GgufTarget.candidate
    monkeypatch.setattr(GgufTarget, "candidate", lambda *of: Candidate(Overflowing(whole(*of).weights)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--profile", "uniform-8bit", "--sequence-length", "32", "--output", tmp_path / "m.gguf"]
    done = CliRunner().invoke(main, [str(a) for a in (*arguments, "--strict", "--fresh", tiny("llama-256"))])
    assert done.exit_code == EXIT_CODE, done.stderr
    report = json.loads((tmp_path / "m.bitwright" / "report.json").read_text(), parse_constant=pytest.fail)
    quality, coherence = report["quality"], report["coherence"]
    assert report["verdict"] == "failed" and coherence["verdict"] == "failed" and report["better"]
    assert quality["mean_kld"] is None and quality["not_finite"] == quality["tokens"]
    assert coherence["held_out_not_finite"] == coherence["greedy_prompts"] == 32
    said = f"not finite in {quality['tokens']} of {quality['tokens']} places"
    assert "the model has failed" in done.stderr and said in done.stderr
    assert "mean KLD not finite" in done.stdout
    assert said in (tmp_path / "m.bitwright" / "report.html").read_text()


@pytest.mark.parametrize(("push", "said"), [([], ""), (["--push-to", "org/name"], "not published")])
def test_strictness_ends_with_its_own_code_and_publishes_nothing(tiny, tmp_path, monkeypatch, push, said):
    monkeypatch.setattr("converter.pipeline.overall", lambda *_: "severe")
    monkeypatch.setattr("converter.publish.preflight", lambda *_: None)
    monkeypatch.setattr("converter.cli.push", lambda *_: pytest.fail("published"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--profile", "uniform-8bit", "--sequence-length", "32", "--output", tmp_path / "m.gguf"]
    arguments = [str(a) for a in (*arguments, *push, tiny("llama-256"))]
    strict = CliRunner().invoke(main, [*arguments, "--strict"])
    assert strict.exit_code == EXIT_CODE, strict.stderr
    assert "severely damaged" in strict.stderr and said in strict.stderr
    assert (tmp_path / "m.gguf").exists() and (tmp_path / "m.bitwright" / "report.json").exists()
    if not push:
        assert CliRunner().invoke(main, arguments).exit_code == 0


def test_strictness_needs_a_measurement(tiny):
    refused = CliRunner().invoke(main, ["--strict", "--no-quality", str(tiny("llama-256"))])
    assert refused.exit_code == 1 and "--no-quality leaves out" in refused.stderr
    assert EXIT_CODE == 3 and N_TOKENS == 32
