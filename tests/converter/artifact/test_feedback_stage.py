"""Error feedback in a whole conversion: kept where held-out inputs say so, recorded, resumable, left out when asked."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from bitwright import converter
from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.second_moments import INDEX_NAME, open_moments, write_moments
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.artifact.feedback import Feedback, moment_widths, wants_feedback
from bitwright.converter.cli import main
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.verify import artifact_tensors
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.rescaled import input_factors
from bitwright.converter.model.stored_rows import read_rows
from bitwright.converter.pipeline import run
from bitwright.converter.preparation import prepare
from bitwright.converter.smoothing.record import load_smoothing
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.source.smoothed import SmoothedCheckpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.feedback.moment_factor import factorize
from bitwright.formats.files.seals import write_sealed
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.planning.protect import pin, rescaled_specs
from bitwright.profiles.reading.schema import load_profile, parse_profile

OPTIONS = {"samples": 128, "sequence_length": 16, "judge": "off", "quiet": True, "effort": "fast"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    generator = np.random.default_rng(3)
    path.write_text("".join(generator.choice(list("abc defghij klmnop 0123456789.\n"), 8000)))
    return path


@pytest.fixture(scope="module")
def reports(tiny, text, tmp_path_factory) -> dict[bool, dict]:
    """The report of a conversion with feedback and of one without."""
    directory = tmp_path_factory.mktemp("conversions")
    return {
        feedback: converter.convert(
            tiny("llama-256"),
            profile="mlp-low-precision",
            output=directory / f"{feedback}.gguf",
            calibration=str(text),
            error_feedback=feedback,
            **OPTIONS,
        )
        for feedback in (True, False)
    }


def decoded(report: dict) -> dict[str, np.ndarray]:
    stored = artifact_tensors([Path(file["path"]) for file in report["artifact"]["files"]])
    return {name: tensor.decode(0, int(np.prod(tensor.shape[:-1]))) for name, tensor in stored.items()}


def test_output_error_on_unseen_inputs_falls_and_is_on_record(reports):
    feedback = reports[True]["feedback"]
    assert feedback["matrices"] == len(feedback["outcomes"]) > 20
    assert feedback["kept"] > 0.8 * feedback["matrices"]
    assert feedback["feedback_error"] < 0.9 * feedback["plain_error"]
    for outcome in feedback["outcomes"]:
        assert outcome["kept"] == (outcome["feedback_error"] < outcome["plain_error"])
        assert outcome["kept"] or outcome["reason"]
    assert reports[False]["feedback"] is None


def test_only_matrices_that_kept_it_differ_from_plain_encoding(reports):
    with_feedback, without = decoded(reports[True]), decoded(reports[False])
    kept = {outcome["tensor"] for outcome in reports[True]["feedback"]["outcomes"] if outcome["kept"]}
    differing = {name for name, rows in with_feedback.items() if not np.array_equal(rows, without[name])}
    assert differing == kept


def test_it_is_part_of_the_recipe_and_of_the_plans_digest(reports):
    recipes = [reports[feedback]["recipe"] for feedback in (True, False)]
    assert "error_feedback" in recipes[0] and "error_feedback" not in recipes[1]
    assert reports[True]["plan_sha256"] != reports[False]["plan_sha256"]
    assert recipes[0]["error_feedback"] == "best"
    assert "--error-feedback=best" in reports[True]["arguments"]
    assert "--error-feedback=off" in reports[False]["arguments"]


def test_moments_are_deleted_when_everything_is_encoded(reports):
    work_dir = Path(reports[True]["path"]).parent
    assert not (work_dir / "moments").exists()
    assert (work_dir / "imatrix.gguf").exists()


def test_the_report_says_it_in_a_line(reports, tiny, text, tmp_path):
    arguments = ["--profile", "mlp-low-precision", "--calibration", str(text), "--samples", "128", "--effort", "fast"]
    arguments += ["--sequence-length", "16", "--judge", "off", "--output", str(tmp_path / "model.gguf")]
    arguments += ["--error-feedback"]
    done = CliRunner().invoke(main, [*arguments, str(tiny("llama-256"))])
    assert done.exit_code == 0, done.stderr
    feedback = reports[True]["feedback"]
    said = f"kept by {feedback['kept']} of {feedback['matrices']} matrices"
    assert said in done.stdout
    assert f"Error feedback {said}" in Path(reports[True]["page"]).read_text()
    assert (tmp_path / "model.gguf").read_bytes() == Path(reports[True]["artifact"]["files"][0]["path"]).read_bytes()


def stopped_while_encoding(model: Path, profile: str, output: Path, text: Path, **options) -> Job:
    """A job with feedback that was stopped; the same job continues."""
    options |= {key: value for key, value in OPTIONS.items() if key != "quiet"}
    job = Job(str(model), load_profile(profile), output=output, calibration=str(text), error_feedback="best", **options)
    polls = iter([False] * 6)
    with pytest.raises(ConvertError, match="stopped as asked"):
        run(job, Progress(), lambda: next(polls, True))
    assert (default_work_dir(output) / "moments" / INDEX_NAME).exists()
    return job


def test_stopped_while_encoding_it_continues_to_the_same_bytes(reports, tiny, text, tmp_path):
    job = stopped_while_encoding(tiny("llama-256"), "mlp-low-precision", tmp_path / "model.gguf", text)
    report = run(job, Progress())[1].to_dict()
    first = reports[True]
    assert report["artifact"]["files"][0]["sha256"] == first["artifact"]["files"][0]["sha256"]
    assert report["feedback"] == first["feedback"]


def test_a_given_imatrix_calibrates_nothing_unless_feedback_is_asked_for(reports, tiny, text, tmp_path):
    imatrix = Path(reports[True]["path"]).parent / "imatrix.gguf"
    options = {"profile": "mlp-low-precision", "imatrix": imatrix, "calibration": str(text), **OPTIONS}
    without = converter.convert(tiny("llama-256"), output=tmp_path / "without.gguf", **options)
    assert without["feedback"] is None and "calibrate" not in without["seconds"]
    job = Job(str(tiny("llama-256")), load_profile("mlp-low-precision"), output=tmp_path / "m.gguf", imatrix=imatrix)
    assert any("--error-feedback quick" in note for note in prepare(job).notes)
    told = prepare(replace(job, error_feedback="off"))
    assert not any("feedback" in note for note in told.notes)
    asked = converter.convert(tiny("llama-256"), output=tmp_path / "asked.gguf", error_feedback=True, **options)
    for name, rows in decoded(asked).items():
        np.testing.assert_array_equal(rows, decoded(reports[True])[name])


def pure_plan(model: Path, format_name: str) -> Plan:
    """Every matrix of the layers in that format."""
    profile = parse_profile(f'description = ""\ngood_for = ""\nbase = "{format_name}"\n', "pure", "test")
    return assign(profile, describe(open_checkpoint(str(model))), effort="fast")


def encoded(
    model: Path, moments_dir: Path | None, format_name: str, threads: int = 2, plan: Plan | None = None
) -> tuple[dict, dict]:
    """Data and outcomes of every tensor of the plan, or of all in that format, with those moments."""
    checkpoint, plan = open_checkpoint(str(model)), plan or pure_plan(model, format_name)
    feedback = Feedback(moments_dir, "best", "fast") if moments_dir else None
    importance = ImportanceMatrix(
        sums={p.tensor.name: np.ones((p.tensor.n_matrices, p.tensor.n_columns)) for p in plan.tensors},
        counts={p.tensor.name: np.ones(p.tensor.n_matrices, np.int64) for p in plan.tensors},
    )
    with Encoder(checkpoint, plan, importance, threads, feedback) as encoder:
        data = {p.tensor.name: np.concatenate([part.ravel() for part in encoder.encode(p)]) for p in plan.tensors}
        return data, dict(encoder.outcomes)


def write_all_moments(model: Path, directory: Path, held_out_like: bool = True) -> None:
    """Correlated inputs for every matrix of the layers; held out: of the same kind, or of their opposite."""
    generator = np.random.default_rng(0)
    groups = {}
    for tensor in describe(open_checkpoint(str(model))).tensors:
        if tensor.layer is None or not tensor.quantizable:
            continue
        n = tensor.n_columns
        mixing = generator.standard_normal((n // 2, n))
        seen = generator.standard_normal((4 * n, n // 2)) @ mixing
        other = generator.standard_normal((64, n // 2)) @ mixing
        if not held_out_like:
            # Only along directions that no input has had, where feedback puts what it takes away elsewhere.
            other = np.linalg.svd(mixing)[2][n // 2 :]
        write_moments(directory, tensor.name, (seen.T @ seen).astype(np.float32), other.astype(np.float32))
        groups[tensor.name] = [tensor.name] * tensor.n_matrices
    write_sealed(directory / INDEX_NAME, "index", json.dumps(groups).encode())


@pytest.mark.parametrize("format_name", ["NVFP4", "Q4_0"])
def test_experts_and_second_level_scales(format_name, tiny, tmp_path):
    """Every matrix of a stacked tensor decides for itself, on any number of threads."""
    model = tiny("qwen3_moe")
    write_all_moments(model, tmp_path / "moments")
    plain, _ = encoded(model, None, format_name)
    data, outcomes = encoded(model, tmp_path / "moments", format_name)
    again, _ = encoded(model, tmp_path / "moments", format_name, threads=1)
    for name in data:
        np.testing.assert_array_equal(data[name], again[name])
    experts = outcomes["blk.0.ffn_up_exps.weight"]
    assert [outcome.matrix for outcome in experts] == list(range(8))
    assert all(outcome.kept and outcome.feedback_error < 0.8 * outcome.plain_error for outcome in experts)
    assert not np.array_equal(data["blk.0.ffn_up_exps.weight"], plain["blk.0.ffn_up_exps.weight"])


def test_a_matrix_that_gains_nothing_on_held_out_inputs_stays_plain(tiny, tmp_path):
    model = tiny("llama-256")
    write_all_moments(model, tmp_path / "moments", held_out_like=False)
    plain, _ = encoded(model, None, "Q2_K")
    data, outcomes = encoded(model, tmp_path / "moments", "Q2_K")
    for name, (outcome,) in outcomes.items():
        assert not outcome.kept and "does not fall" in outcome.reason
        assert outcome.feedback_error > outcome.plain_error
        np.testing.assert_array_equal(data[name], plain[name])


def test_a_matrix_without_moments_or_held_out_inputs_says_so(tiny, tmp_path):
    model, directory = tiny("llama-256"), tmp_path / "moments"
    write_all_moments(model, directory)
    groups = json.loads((directory / INDEX_NAME).read_text())
    groups["blk.0.attn_k.weight"] = [None]
    write_sealed(directory / INDEX_NAME, "index", json.dumps(groups).encode())
    write_moments(directory, "blk.0.attn_q.weight", np.eye(256, dtype=np.float32), np.empty((0, 256), np.float32))
    plain, _ = encoded(model, None, "Q2_K")
    data, outcomes = encoded(model, directory, "Q2_K")
    assert outcomes["blk.0.attn_k.weight"][0].reason == "no second moments of its inputs"
    assert outcomes["blk.0.attn_q.weight"][0].reason == "no inputs were held out to judge by"
    for name in ("blk.0.attn_k.weight", "blk.0.attn_q.weight"):
        np.testing.assert_array_equal(data[name], plain[name])
    assert outcomes["blk.0.attn_v.weight"][0].kept


def test_pins_hold_and_the_rest_of_the_row_makes_up_for_them(tiny, tmp_path):
    model, name = tiny("llama-256"), "blk.1.ffn_down.weight"
    write_all_moments(model, tmp_path / "moments")
    # The second block of a row, in one chunk with rows that have no pin.
    plan = pin(pure_plan(model, "Q3_K"), name, [(0, 100, 300), (0, 7, 500)], 0.01, "pinned")
    plain, _ = encoded(model, None, "Q3_K", plan=plan)
    fed, outcomes = encoded(model, tmp_path / "moments", "Q3_K", plan=plan)
    assert outcomes[name][0].kept
    before, after = (data[name].reshape(-1, 2, 110) for data in (plain, fed))
    for row in (100, 7):
        np.testing.assert_array_equal(after[row, 1], before[row, 1])
        assert not np.array_equal(after[row, 0], before[row, 0])
    spec = next(p.tensor for p in plan.tensors if p.tensor.name == name)
    rows = read_rows(open_checkpoint(str(model)), spec, 0, spec.n_rows)
    values = get_format("Q3_K").decode(fed[name].reshape(len(rows), -1))
    for row, column in ((100, 300), (7, 500)):
        assert abs(values[row, column] / rows[row, column] - 1) <= 0.01


def test_a_rescaled_column_is_fed_what_it_is_divided_by(tiny, tmp_path):
    """Moments of the inputs as they were, rescaled, are those of inputs that were rescaled before."""
    model, name = tiny("qwen3_moe"), "blk.0.ffn_down_exps.weight"
    model_map = describe(open_checkpoint(str(model)))
    write_all_moments(model, tmp_path / "moments")
    specs = rescaled_specs(model_map, name, {(3, 5): 4.0, (3, 9): 0.25, (6, 0): 2.0})
    planned = replace(next(p for p in pure_plan(model, "Q4_0").tensors if p.tensor.name == name), tensor=specs[name])
    feedback, stored = Feedback(tmp_path / "moments", "best", "fast"), open_moments(tmp_path / "moments").load(name)
    for matrix, factors in ((3, {5: 4.0, 9: 0.25}), (6, {0: 2.0}), (0, {})):
        scale = np.ones(planned.tensor.n_columns)
        scale[list(factors)] = list(factors.values())  # the up projection's rows, so this projection's inputs
        expected = factorize((stored.matrix * np.outer(scale, scale)).astype(np.float32), 1)
        inputs = feedback.inputs(name, matrix, 1, map, input_factors(planned.tensor, matrix))
        np.testing.assert_allclose(inputs.factor.matrix, expected.matrix, rtol=1e-6)
        held_out = (stored.held_out * scale).astype(np.float32)
        np.testing.assert_allclose(inputs.held_out.T[: len(held_out)], held_out, rtol=1e-6)


def test_what_asks_for_it_in_vain_is_told(tiny, text, tmp_path):
    for profile in ("uniform-8bit", "fp8"):
        job = Job(str(tiny("llama-256")), load_profile(profile), output=tmp_path / "m", error_feedback="best")
        assert any("--error-feedback changes nothing" in note for note in prepare(job).notes)


def directory(model: Path, output: Path, text: Path, profile: str, **options) -> dict:
    options = {"calibration": str(text), "error_feedback": True, **OPTIONS, **options}
    return converter.convert(model, profile=profile, output=output, **options)


@pytest.mark.parametrize(
    ("model", "profile", "alpha"),
    [
        ("llama-256", "W4A16_G32", None),
        ("qwen3_moe", "W4A16_G32", None),
        ("llama-256", "NVFP4", None),
        ("llama-256", "W8A8", 0.5),
        ("qwen3_moe", "W8A8", "auto"),
    ],
)
def test_of_a_directory_the_output_error_falls(model, profile, alpha, tiny, text, tmp_path):
    plain = directory(tiny(model), tmp_path / "plain", text, profile, alpha=alpha, error_feedback=False)
    fed = directory(tiny(model), tmp_path / "fed", text, profile, alpha=alpha)
    feedback, names = fed["feedback"], {row["tensor"] for row in json.loads(plan_of(tmp_path / "fed"))["tensors"]}
    assert feedback["feedback_error"] < 0.95 * feedback["plain_error"]
    assert feedback["kept"] > 0.8 * feedback["matrices"] and {o["tensor"] for o in feedback["outcomes"]} <= names
    assert plain["feedback"] is None and "error_feedback" in fed["recipe"]
    files = [load_file(tmp_path / which / "model.safetensors") for which in ("plain", "fed")]
    assert {name: array.shape for name, array in files[0].items()} == {n: a.shape for n, a in files[1].items()}
    kept = {o["tensor"] for o in feedback["outcomes"] if o["kept"]}
    artifacts = [DirectoryArtifact.of_recipe(tmp_path / which) for which in ("plain", "fed")]
    encoded = {row["tensor"] for row in feedback["outcomes"]}
    differing = {name for name in encoded if not np.array_equal(*(artifact.read(name) for artifact in artifacts))}
    assert differing == kept
    assert not (default_work_dir(tmp_path / "fed") / "moments").exists()


def plan_of(output: Path) -> bytes:
    return (default_work_dir(output) / "plan.json").read_bytes()


def test_a_smoothed_matrix_is_fed_its_inputs_divided_by_the_factors(tiny, text, tmp_path):
    """What a matrix of the directory loses on the inputs of the smoothed model is what was said of held-out ones."""
    model, output = tiny("llama-256"), tmp_path / "fed"
    report = directory(model, output, text, "W8A8", alpha=0.7)
    smoothing = load_smoothing(default_work_dir(tmp_path / "fed") / "smoothing.safetensors")
    checkpoint = open_checkpoint(str(model))
    corpus = load_corpus(str(text), load_tokenizer(model), 128, 16, chat=False)
    streamable, control = StreamableModel(checkpoint, model, device="cpu"), PassControl(tmp_path / "work")
    stream_importance(streamable, observed_names(describe(checkpoint)), corpus, control, tmp_path / "moments")
    moments = open_moments(tmp_path / "moments")
    view, artifact = SmoothedCheckpoint.of(checkpoint, smoothing.foldings), DirectoryArtifact.of_recipe(output)
    outcomes = {outcome["tensor"]: outcome for outcome in report["feedback"]["outcomes"]}
    roles = (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output"))
    kept = 0
    for layer, (role, gguf) in product(range(4), roles):
        name, tensor = f"model.layers.{layer}.{role}.weight", f"blk.{layer}.{gguf}.weight"
        if name not in outcomes or not outcomes[name]["kept"]:
            continue
        group = moments.group(tensor, 0)
        assert group is not None
        inputs = moments.load(group).held_out / smoothing.factors[tensor][0]
        source = view.read(name)
        lost = np.square((source - artifact.read(name)) @ inputs.T).sum() / np.square(source @ inputs.T).sum()
        assert lost == pytest.approx(outcomes[name]["feedback_error"], rel=1e-3)
        kept += 1
    assert kept >= 2


def test_a_matrix_that_gets_no_feedback_goes_by_its_own_name(tiny, text, tmp_path):
    """The output head has no second moments."""
    report = directory(tiny("llama-256"), tmp_path / "fed", text, "W4A16_G32", overrides=["output=W4A16_G32"])
    (outcome,) = [o for o in report["feedback"]["outcomes"] if o["plain_error"] is None]
    assert outcome["tensor"] == "lm_head.weight" and not outcome["kept"]
    assert outcome["reason"] == "no second moments of its inputs"


def test_a_directory_has_the_same_bytes_on_any_threads_and_after_a_stop(tiny, text, tmp_path):
    whole = directory(tiny("llama-256"), tmp_path / "whole", text, "W4A16_G32", threads=1)
    job = stopped_while_encoding(tiny("llama-256"), "W4A16_G32", tmp_path / "model", text, threads=2)
    report = run(job, Progress())[1].to_dict()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert report["feedback"] == whole["feedback"]


def test_a_directory_with_an_importance_matrix_calibrates_for_the_moments(tiny, text, tmp_path):
    first = directory(tiny("llama-256"), tmp_path / "first", text, "W4A16_G32")
    importance = default_work_dir(tmp_path / "first") / "imatrix.gguf"
    second = directory(tiny("llama-256"), tmp_path / "second", text, "W4A16_G32", imatrix=importance)
    assert second["feedback"] == first["feedback"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["--error-feedback"], "best"),
        (["--error-feedback", "quick"], "quick"),
        (["--error-feedback=off"], None),
        (["--no-error-feedback"], None),
        ([], "quick"),
    ],
)
def test_the_option_may_stand_alone_before_the_model(written, expected, tiny):
    arguments = ["plan", "--json", "--profile", "mlp-low-precision", *written, str(tiny("llama-256"))]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    job = Job(str(tiny("llama-256")), load_profile("mlp-low-precision"), error_feedback=expected or "off")
    assert json.loads(done.stdout)["plan_sha256"] == prepare(job).plan.digest()


def test_preflight_counts_the_moments(tiny, tmp_path, monkeypatch):
    model_map = describe(open_checkpoint(str(tiny("llama-256"))))
    assert moment_widths(model_map) == {layer: [256, 256, 256, 512] for layer in range(4)}
    experts = moment_widths(describe(open_checkpoint(str(tiny("qwen3_moe")))))[0]
    # What attention, its output, the router and all experts are fed; then each expert's down projection.
    assert sorted(experts) == sorted([64, 128, 64, 64] + [32] * 8)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("bitwright.converter.preflight.shutil.disk_usage", lambda _: usage._replace(free=80 << 20))
    monkeypatch.setattr("bitwright.converter.preflight.moment_bytes", lambda widths: 10 << 20)
    options = {"profile": "mlp-low-precision", "output": tmp_path / "model.gguf", "calibration": "embedded", **OPTIONS}
    with pytest.raises(ConvertError, match="the disk has"):
        converter.convert(tiny("llama-256"), error_feedback=True, **options)


def test_the_plan_decides_before_anything_runs(tiny, tmp_path):
    def plan(profile: str, **options):
        return prepare(Job(str(tiny("llama-256")), load_profile(profile), output=tmp_path, **options)).plan

    assert plan("mlp-low-precision", error_feedback="best").error_feedback == "best"
    assert plan("mlp-low-precision").error_feedback == "quick"
    assert plan("mlp-low-precision", error_feedback="off").error_feedback is None
    digests = {plan("mlp-low-precision", error_feedback=level).digest() for level in ("off", "quick", "best")}
    assert len(digests) == 3
    # Nothing coarse enough for it to matter.
    assert plan("uniform-8bit", error_feedback="best").error_feedback is None
    assert plan("W4A16_G32").error_feedback == plan("NVFP4A16").error_feedback == "quick"
    # At 8 bits, and where it would take a pass over the model of its own, it has to be asked for.
    for profile in ("W8A16", "NVFP4"):
        assert plan(profile).error_feedback is None
        assert plan(profile, error_feedback="quick").error_feedback == "quick"
    assert not any(map(wants_feedback, plan("uniform-8bit").tensors))
