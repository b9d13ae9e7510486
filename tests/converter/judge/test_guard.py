"""The coherence guard: the same findings by either runtime and after interruptions; verdicts and their advice."""

import json
import shlex
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.calibration.control import Interrupted, never, silent
from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.run import Run
from bitwright.converter.cli import main
from bitwright.converter.gguf.target import GgufTarget
from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.judge.child import RuntimeFailed
from bitwright.converter.judge.generate import generate_by_llama_cpp, n_together
from bitwright.converter.judge.guard import (
    FEWEST_HELD_OUT,
    FEWEST_TOKENS,
    HELD_OUT_PROMPTS,
    N_TOKENS,
    PROMPTS,
    Extent,
    prompt_tokens,
    streamed_coherence,
    verdict,
)
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.data import Coherence
from bitwright.converter.report.text import coherence_line
from bitwright.converter.report.verdict import (
    EXIT_CODE,
    better_recipe,
    grade_of_loss,
    overall,
    quality_warning,
    verdict_line,
    warning,
)
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.typed import from_plain
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.reading.schema import load_profile, parse_profile
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32
from tests.converter.report.reports import AGREEMENT, COHERENCE, QUALITY, answer, report
from tests.converter.runs import run_of


@pytest.fixture(scope="module")
def f32(tiny, tmp_path_factory) -> Path:
    """The tiny llama as a GGUF in F32: what it generates is what the source generates."""
    path = tmp_path_factory.mktemp("f32") / "m.gguf"
    write_f32(tiny("llama-256"), path)
    return path


@pytest.fixture
def few_prompts(monkeypatch) -> None:
    monkeypatch.setattr("bitwright.converter.judge.guard.PROMPTS", PROMPTS[:3])
    monkeypatch.setattr("bitwright.converter.judge.guard.HELD_OUT_PROMPTS", 4)


def run_guard(model: Path, artifact: Path, work_dir: Path, should_stop=never) -> dict:
    run = run_of(model, work_dir, should_stop)
    candidate = Candidate(DecodedArtifact([artifact], run.model_map), artifact=artifact)
    return streamed_coherence(Judging.of_run(run), candidate, "embedded")


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
    monkeypatch.setattr("bitwright.converter.judge.child.installed", lambda: False)
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
        patch.setattr("bitwright.converter.judge.guard.generate_by_llama_cpp", dies)
        found = run_guard(tiny("llama-256"), f32, tmp_path / "work")
    assert found["verdict"] == "severe" and found["greedy_agreement"] == 1
    text = warning(report(quality=None, coherence=from_plain(Coherence, found), better="convert x"))
    assert "llama.cpp does not run the artifact: llama.cpp was ended by SIGABRT" in text and "convert x" in text


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

    monkeypatch.setattr("bitwright.converter.judge.guard.generate_by_llama_cpp", one_overflows)
    found = run_guard(tiny("llama-256"), f32, tmp_path)
    assert found["verdict"] == "severe" and found["held_out_not_finite"] == 1 and found["greedy_agreement"] == 0.75
    text = warning(report(quality=None, coherence=from_plain(Coherence, found)))
    assert "1 of 4 continuations of held-out text end where the predictions are not finite" in text


def test_the_worse_of_both_measures_counts_and_is_never_averaged():
    failed, coherent = replace(COHERENCE, verdict="failed"), COHERENCE

    def loss(mean_kld: float | None) -> QualityReport:
        return replace(QUALITY, mean_kld=mean_kld, perplexity=10.1, top1_agreement=0.95)

    for kld, grade in ((0.009, "near-lossless"), (0.02, "good"), (0.1, "fair"), (0.4, "lossy"), (0.5, "damaged")):
        assert overall(loss(kld), coherent, None) == grade
    assert overall(loss(None), coherent, None) == overall(loss(0.001), failed, None) == "damaged"
    assert overall(loss(0.001), replace(coherent, verdict="noticeable"), None) == "lossy"
    assert overall(loss(0.001), coherent, replace(AGREEMENT, verdict="differs")) == "near-lossless"
    assert overall(loss(0.001), coherent, replace(AGREEMENT, verdict="disagrees")) == "damaged"
    assert overall(None, None, replace(AGREEMENT, verdict=None)) is None
    looping = replace(failed, prompts=(*(answer("loop"),) * 7, answer()))
    text = warning(report(quality=None, coherence=looping))
    assert (
        "the model is damaged" in text
        and "it no longer writes text" in text
        and "7 of 8 answers" in text
        and "'SSSS'" in text
    )


@pytest.mark.parametrize(
    ("changes", "grade"),
    [
        ({}, "near-lossless"),
        ({"top1_agreement": 0.85}, "good"),
        ({"top1_agreement": 0.4}, "damaged"),
        ({"perplexity": 12.5}, "fair"),
        ({"perplexity": 9.0}, "near-lossless"),
    ],
)
def test_the_worst_of_divergence_top_token_and_perplexity_is_the_grade(changes, grade):
    quality = replace(QUALITY, mean_kld=0.001, perplexity=10.1, top1_agreement=0.95)
    assert grade_of_loss(replace(quality, **changes)) == grade


def test_the_first_line_says_the_verdict():
    assert verdict_line(report()) == "Verdict: fair (KLD 0.0500, same top token 87.5%, perplexity +25.0%)"
    unmeasured = report(quality=None, coherence=None, agreement=None)
    assert verdict_line(unmeasured) == "Verdict: not measured (--judge off)"


def test_advice_fits_what_was_made():
    lost = replace(QUALITY, mean_kld=0.3)
    assert "balanced-4bit" in str(quality_warning(lost, "gguf")) and "--profile fp8" in str(
        quality_warning(lost, "safetensors")
    )
    assert quality_warning(QUALITY, "gguf") is None


def test_the_better_recipe_is_a_command_that_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    model_map = describe(checkpoint)
    plan_of = partial(assign, model_map=model_map)
    name_of = attrgetter("name")
    low = parse_profile('description = ""\ngood_for = ""\nbase = "IQ1_S"', "low", "low.toml")
    job = Job(str(tiny("llama-256")), low, output=tmp_path / "tiny-LOW.gguf", work_dir=tmp_path / "work")
    run = Run(job, tmp_path / "tiny-LOW.gguf", tmp_path, checkpoint, model_map, Progress(quiet=True), never)
    plan = assign(low, model_map)
    assert better_recipe(run, plan_of, name_of, plan, "good") is None
    sizes = []
    for degree in ("lossy", "damaged"):
        command = better_recipe(run, plan_of, name_of, plan, degree)
        profile = load_profile(shlex.split(command)[2])
        sizes.append(plan_of(profile.by_rules()).n_bytes / plan.n_bytes)
    assert 1.1 <= sizes[0] <= sizes[1] and sizes[1] >= 1.25
    program, *arguments = shlex.split(command)
    assert program == "bitwright"
    done = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] != str(job.output)
    said = replace(run, job=replace(job, calibration="a text.txt", pre_tokenizer="qwen2", shard_bytes=200_000))
    again = shlex.split(better_recipe(said, plan_of, name_of, plan, "damaged"))
    for pair in (["--calibration", "a text.txt"], ["--pre-tokenizer", "qwen2"], ["--split-size", "200000"]):
        assert again[again.index(pair[0]) :][:2] == pair
    finest = load_profile("fp16-baseline")
    assert better_recipe(run, plan_of, name_of, assign(finest, model_map), "damaged") is None


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
    said = json.loads((tmp_path / "m.bitwright" / "report.json").read_text(), parse_constant=pytest.fail)
    quality, coherence = said["quality"], said["coherence"]
    assert said["verdict"] == "damaged" and coherence["verdict"] == "failed" and said["better"]
    assert quality["mean_kld"] is None and quality["not_finite"] == quality["tokens"]
    assert coherence["held_out_not_finite"] == coherence["greedy_prompts"] == 32
    divergence = f"not finite in {quality['tokens']} of {quality['tokens']} places"
    assert "the model is damaged" in done.stderr and divergence in done.stderr
    assert "mean KLD not finite" in done.stdout
    assert divergence in (tmp_path / "m.bitwright" / "report.html").read_text()


@pytest.mark.parametrize(("push", "said"), [([], ""), (["--push-to", "org/name"], "not published")])
def test_strictness_ends_with_its_own_code_and_publishes_nothing(tiny, tmp_path, monkeypatch, push, said):
    monkeypatch.setattr("bitwright.converter.report.assemble.overall", lambda *_: "damaged")
    monkeypatch.setattr("bitwright.converter.publishing.stage.preflight", lambda *_: None)
    monkeypatch.setattr("bitwright.converter.commands.convert.push", lambda *_: pytest.fail("published"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--profile", "uniform-8bit", "--sequence-length", "32", "--output", tmp_path / "m.gguf"]
    arguments = [str(a) for a in (*arguments, *push, tiny("llama-256"))]
    strict = CliRunner().invoke(main, [*arguments, "--strict"])
    assert strict.exit_code == EXIT_CODE, strict.stderr
    assert "the model is damaged" in strict.stderr and said in strict.stderr
    assert (tmp_path / "m.gguf").exists() and (tmp_path / "m.bitwright" / "report.json").exists()
    if not push:
        assert CliRunner().invoke(main, arguments).exit_code == 0


def test_strictness_needs_a_measurement(tiny):
    refused = CliRunner().invoke(main, ["--strict", "--judge", "off", str(tiny("llama-256"))])
    assert refused.exit_code == 1 and "--judge off leaves out" in refused.stderr
    assert EXIT_CODE == 3 and N_TOKENS == 32


def test_a_fast_judgement_is_completed_later(tiny, tmp_path, monkeypatch):
    """Each is measured once, and nothing is encoded again."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [
        "--profile",
        "uniform-8bit",
        "--sequence-length",
        "32",
        "--output",
        tmp_path / "m.gguf",
        tiny("llama-256"),
    ]

    def judged(judge: str) -> tuple[dict, str]:
        done = CliRunner().invoke(main, [str(a) for a in ("--judge", judge, "--json", *arguments)])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    none, _ = judged("off")
    assert none["quality"] is None and none["verdict"] is None
    fast, _ = judged("fast")
    assert (
        fast["quality"]["samples"] == 4
        and len(fast["coherence"]["prompts"]) == fast["coherence"]["greedy_prompts"] == 4
    )
    written = (tmp_path / "m.gguf").stat().st_mtime_ns
    full, _ = judged("full")
    assert full["quality"]["samples"] == 16 and len(full["coherence"]["prompts"]) == len(PROMPTS)
    assert (tmp_path / "m.gguf").stat().st_mtime_ns == written
    again, said = judged("fast")  # what is known in full is known
    assert "already done" in said and again["quality"] == full["quality"]


def test_of_a_large_model_less_is_generated():
    whole = Extent(HELD_OUT_PROMPTS, N_TOKENS)
    assert Extent.of_model(135_000_000, 400) == Extent.of_model(9_000_000_000, 400) == whole and not whole.note
    sizes = [Extent.of_model(n * 10**9, 400) for n in (14, 32, 70, 671)]
    assert whole.held_out > sizes[0].held_out > sizes[1].held_out and sizes[0].n_tokens == N_TOKENS
    assert sizes[-1] == Extent(FEWEST_HELD_OUT, FEWEST_TOKENS)
    text = coherence_line(replace(COHERENCE, runtime_note=sizes[-1].note))
    assert "4 held-out texts and 16 tokens each, as the model is large" in text


def test_what_is_shortened_is_what_the_whole_begins_with(tiny, f32, tmp_path, few_prompts, monkeypatch):
    whole = run_guard(tiny("llama-256"), f32, tmp_path / "whole")
    monkeypatch.setattr("bitwright.converter.judge.guard.MOST_PRODUCTS", 0)
    short = run_guard(tiny("llama-256"), f32, tmp_path / "short")
    assert short["runtime_note"].keys() == {"shortened"} and short["greedy_tokens"] == FEWEST_TOKENS
    assert short["verdict"] == "coherent" and short["greedy_agreement"] == 1
    for few, all_ in zip(short["prompts"], whole["prompts"], strict=True):
        assert few["tokens"] == min(FEWEST_TOKENS, all_["tokens"]) and all_["text"].startswith(few["text"])


def test_a_streamed_source_answers_as_far_as_it_takes(tiny, f32, tmp_path, few_prompts, monkeypatch):
    whole = run_guard(tiny("llama-256"), f32, tmp_path / "whole")
    monkeypatch.setattr("bitwright.calibration.evaluation.generation._free_memory", lambda _: 0)
    monkeypatch.setattr("bitwright.calibration.evaluation.generation.SETTLED_TOKENS", 5)
    found = run_guard(tiny("llama-256"), f32, tmp_path / "streamed")
    assert found["runtime_note"].keys() == {"source"} and found["verdict"] == whole["verdict"]
    for streamed, resident in zip(found["prompts"], whole["prompts"], strict=True):
        assert streamed["source_text"] and resident["source_text"].startswith(streamed["source_text"])
        assert streamed["text"] == resident["text"]


def test_prompts_that_do_not_fit_side_by_side_take_turns(f32, monkeypatch):
    prompts = [tiny_models.tokens("llama-256")[:n] for n in (3, 9, 5, 7, 4)]
    with LlamaCpp(f32, n_ctx=64) as model:
        assert model.cache_bytes() == 4 * 2 * 256 * 256 * 2
        with model.sibling(n_sequences=5) as together:
            shown: list[list[int]] = [[] for _ in prompts]

            def seen(i: int, logits: np.ndarray) -> bool:
                shown[i].append(int(logits.argmax()))
                return len(shown[i]) < 4 + i

            together.generate_together(prompts, 8, seen)
        alone = [model.generate(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    assert shown == alone
    gib = 1 << 30  # what the caches may take where the weights take less
    assert [n_together(gib // 2, 5, 0), n_together(3 * gib, 5, 0), n_together(gib, 5, 3 * gib)] == [2, 1, 3]
