"""Tasks of the lm-evaluation-harness: the arithmetic of the answers, the harness itself, and what is refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.judge.tasks import answer, log_likelihood
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32

ROOT = Path(__file__).parents[3]
HARNESS_PYTHON = Path(os.environ.get("LM_EVAL_PYTHON", ROOT / ".venv-lm-eval/bin/python")).absolute()


@pytest.fixture(scope="module")
def f32(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "m.gguf"
    write_f32(tiny("llama-256"), path)
    return path


def test_likelihoods_are_those_of_transformers(f32):
    tokens, logits = tiny_models.tokens("llama-256"), tiny_models.reference_logits("llama-256").astype(np.float64)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    with LlamaCpp(f32) as model:
        for start, stop in ((1, 2), (5, 9), (30, 31)):
            total, greedy = log_likelihood(model, tokens[:start], tokens[start:stop])
            assert total == pytest.approx(log_p[range(start - 1, stop - 1), tokens[start:stop]].sum(), rel=1e-3)
            assert not greedy
        written = model.generate(tokens[:7], 5)
        assert log_likelihood(model, tokens[:7], written)[1]
        # More than fits: the last tokens count.
        long = tokens * 4
        assert log_likelihood(model, long, tokens[:3]) == log_likelihood(model, long[-(model.n_ctx - 3) :], tokens[:3])


def test_answers_end_before_a_stop_text(f32):
    with LlamaCpp(f32) as model:
        whole = answer(model, "The quick", {"max_gen_toks": 12})
        assert len(whole) > 6
        stop = whole[4:6]
        assert answer(model, "The quick", {"until": [stop], "max_gen_toks": 12}) == whole[: whole.index(stop)]
        assert answer(model, "The quick", {"until": stop, "max_gen_toks": 12}) == whole[: whole.index(stop)]


def write_task(directory: Path) -> Path:
    """Two questions, each with a right and two wrong answers."""
    questions = [{"question": f"Which one? {i}", "choices": ["fox", "dog", "jug"], "answer": i} for i in range(2)]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = directory / "questions.yaml"
    task.write_text(
        f"""task: questions
dataset_path: json
dataset_kwargs:
  data_files: {directory / "questions.jsonl"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    return task


def test_the_harness_runs_a_task_on_the_artifact(tiny, tmp_path):
    """In an environment that has the harness; a finished job runs tasks that it lacks, and keeps what they gave."""
    assert HARNESS_PYTHON.is_file(), f"{HARNESS_PYTHON} is missing: make test makes it, or set LM_EVAL_PYTHON"
    task = write_task(tmp_path)
    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def convert(*options: object) -> subprocess.CompletedProcess:
        command = [str(HARNESS_PYTHON), "-m", "bitwright.converter", *map(str, [*options, *arguments])]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    plain = CliRunner().invoke(main, ["--json", *map(str, arguments)])
    assert plain.exit_code == 0, plain.stderr
    assert json.loads(plain.stdout)["tasks"] is None
    done = convert("--json", "--lm-eval", task)
    assert done.returncode == 0, done.stderr
    tasks = json.loads(done.stdout)["tasks"]
    assert tasks["tasks"] == [str(task)] and tasks["limit"] is None
    with LlamaCpp(tmp_path / "m.gguf") as model:
        right = 0
        for i in range(2):
            context = model.tokenize(f"Which one? {i}")
            totals = [
                log_likelihood(model, context, model.tokenize(f"Which one? {i} {word}")[len(context) :])[0]
                for word in ("fox", "dog", "jug")
            ]
            right += int(np.argmax(totals) == i)
    assert tasks["results"] == {"questions": {"acc": right / 2}}
    misspelt = convert("--fresh", "--lm-eval", "hellaswagg")
    assert misspelt.returncode == 1 and "did you mean 'hellaswag'?" in misspelt.stderr
    assert (tmp_path / "m.gguf").exists()


def test_without_the_harness_it_is_an_error_before_anything_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright.converter.judge.tasks.find_spec", lambda name: None)
    arguments = ["--lm-eval", "hellaswag,arc_easy", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    refused = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert refused.exit_code == 1
    assert "--lm-eval hellaswag,arc_easy" in refused.stderr and "pip install 'bitwright[lm-eval]'" in refused.stderr
    assert list(tmp_path.iterdir()) == []
