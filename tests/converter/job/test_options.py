"""An option is one field of Job: the command line, Python, the fingerprint and the recipe are derived from it."""

from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.commands.parameters import options_of
from bitwright.converter.commands.plan import IDLE
from bitwright.converter.job.build import build_job
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import choices_of, flag, option, option_of
from bitwright.converter.job.recipe import reproducing_arguments
from bitwright.converter.job.spelling import STATISTICS_RECORD
from bitwright.converter.preparation import fingerprint, prepare
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.typed import is_a
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile

COMMANDS = {"convert": "convert-model", "plan": "plan", "imatrix": "imatrix"}
FIELDS = {each.name: each for each in fields(Job)}
OPTIONS = {name: each for name, each in FIELDS.items() if option_of(each).commands}


@pytest.fixture
def plain(tiny, tmp_path, monkeypatch) -> Job:
    """A job with every file beside it that its options may name."""
    monkeypatch.chdir(tmp_path)
    for name in ("imatrix", "sensitivity"):
        Path(name).write_text(name)
    Path("statistics").mkdir()
    Path("statistics", STATISTICS_RECORD).write_text("{}")
    return Job(str(tiny("llama")), load_profile("balanced-4bit"), calibration="embedded")


@pytest.fixture
def checkpoint(plain) -> Checkpoint:
    return open_checkpoint(plain.model, metadata_only=True)


def another_value(of: "Field[Any]", value: Any) -> Any:
    """A value that the field can have, and another one than this."""
    if of.name in ("profile", "overrides"):
        return load_profile("fp8") if of.name == "profile" else (parse_override("mlp_*=Q8_0", "gguf"),)
    if choices := [choice for choice in choices_of(of.type) if choice != value]:
        return choices[-1]
    samples = (value is not True, 0.75, 77, Path(of.name), "changed", ("changed",))
    return next(sample for sample in samples if is_a(sample, of.type))


def changed(job: Job, name: str) -> Job:
    return replace(job, **{name: another_value(FIELDS[name], getattr(job, name))})


def built_from(arguments: list[str]) -> Job:
    """The Job of what follows `convert` on the command line."""
    given = main.commands["convert-model"].make_context("convert", list(arguments)).params
    return build_job(**{name: value for name, value in given.items() if name in FIELDS})


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_says_what_it_is(name):
    described = option_of(FIELDS[name])
    assert described.help.endswith((".", "]"))
    in_no_recipe, compared_by_nothing = described.recipe == "never", described.identity is None
    # The plan has the effort, and the output is a place.
    assert in_no_recipe == compared_by_nothing or name in ("effort", "output")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_of_its_job(command):
    job_of = "convert" if command == "plan" else command
    of_job = {name: each for name, each in OPTIONS.items() if job_of in option_of(each).commands}
    parameters = {each.name: each for each in main.commands[COMMANDS[command]].params if each.name in OPTIONS}
    own = {"output", "sensitivity"} if command == "imatrix" else set()  # of these names, and something else
    assert set(parameters) - own == set(of_job)
    assert [name for name in parameters if name in of_job] == list(of_job)
    shown = " ".join(CliRunner().invoke(main, [COMMANDS[command], "--help"]).stdout.split())
    for name, each in of_job.items():
        assert flag(each) in parameters[name].opts
        if command == "plan" and name in IDLE:
            continue
        assert f" {flag(each)} " in shown and option_of(each).help in shown


@pytest.mark.parametrize("name", FIELDS)
def test_a_job_is_another_one_where_its_option_says_so(plain, name):
    differing = {key for key, value in changed(plain, name).identity().items() if value != plain.identity()[key]}
    assert differing == ({name} if option_of(FIELDS[name]).identity is not None else set())


def test_the_way_of_the_profile_makes_no_other_job(plain):
    assert plain.protection.super_weights == "auto"
    assert replace(plain, protect_super_weights="auto").identity() == plain.identity()


def test_a_fingerprint_has_the_plan_and_the_text_that_is_read(plain):
    prepared = prepare(plain)
    first, options = fingerprint(prepared.run, prepared), plain.identity()
    assert first["calibration"].startswith("embedded") and first["moments"] == prepared.run.job.calibration
    without = prepare(replace(plain, error_feedback="off"))
    assert fingerprint(without.run, without)["moments"] is None
    assert {key: first[key] for key in options if key not in ("calibration", "output")} == {
        key: value for key, value in options.items() if key not in ("calibration", "output")
    }
    for name, differing in (("effort", {"plan"}), ("seed", {"seed"}), ("threads", set())):
        other = prepare(changed(plain, name))
        second = fingerprint(other.run, other)
        assert {key for key in first if first[key] != second[key]} == differing


def test_the_importance_matrix_depends_on_the_options_of_its_command(plain):
    compared = {
        "from_quantized",
        "base",
        "calibration",
        "chat",
        "samples",
        "sequence_length",
        "calibration_dtype",
        "device",
        "seed",
    }
    assert set(plain.identity("imatrix")) == compared


@pytest.mark.parametrize("name", FIELDS)
def test_the_recipe_makes_the_same_job(plain, checkpoint, name):
    job = changed(plain, name)
    arguments = reproducing_arguments(job, checkpoint, reads_text=True)
    if option_of(FIELDS[name]).recipe == "never":
        assert arguments == reproducing_arguments(plain, checkpoint, reads_text=True)
        return
    again = built_from([*arguments[:-1], plain.model])
    assert replace(again, command=job.command) == job
    assert reproducing_arguments(again, checkpoint, reads_text=True) == arguments


def test_a_recipe_leaves_out_the_text_where_nothing_reads_it(plain, checkpoint):
    job = plain
    for name in ("calibration", "chat", "samples", "sequence_length", "calibration_dtype"):
        assert option_of(FIELDS[name]).of_text
        job = changed(job, name)
    assert reproducing_arguments(job, checkpoint, False) == reproducing_arguments(plain, checkpoint, False)
    assert "--no-chat" in reproducing_arguments(replace(job, chat=False), checkpoint, True)


@pytest.mark.parametrize("name", [name for name, each in OPTIONS.items() if option_of(each).least is not None])
def test_a_number_below_the_least_is_refused(plain, name):
    least = option_of(FIELDS[name]).least
    with pytest.raises(ConvertError, match=f"{name} is {least - 1}, and is {least} at least") as caught:
        build_job(plain.model, **{name: least - 1})
    assert flag(FIELDS[name]) in caught.value.where
    failed = CliRunner().invoke(main, ["plan", f"{flag(FIELDS[name])}={least - 1}", plain.model])
    assert failed.exit_code != 0 and flag(FIELDS[name]) in failed.stderr


@pytest.mark.parametrize("arguments", [["evaluate", "m.gguf", "--against"], ["imatrix", "--output", "i.gguf"]])
def test_shared_options_have_the_same_limits(arguments):
    failed = CliRunner().invoke(main, [*arguments, "model", "--threads", "-1"])
    assert failed.exit_code == 2 and "--threads" in failed.stderr


def test_texts_are_read_alike_on_the_command_line_and_in_python(plain):
    given = {"target_size": "1.5K", "shard_bytes": "2KiB", "alpha": "0.25", "lm_eval": "a, b", "work_dir": "there"}
    job = build_job(plain.model, **given)
    values = (job.target_size, job.shard_bytes, job.alpha, job.lm_eval, job.work_dir)
    assert values == (1500, 2048, 0.25, ("a", "b"), Path("there"))
    typed = [f"{flag(FIELDS[name])}={value}" for name, value in given.items()]
    assert built_from([*typed, plain.model]) == job
    assert build_job(plain.model, alpha="auto", lm_eval=None, overrides="mlp_*=Q8_0").alpha == "auto"


def test_an_option_is_added_in_one_place(plain, checkpoint):
    """All that a new option takes is its field."""

    @dataclass(frozen=True)
    class Dithered(Job):
        dither: int = field(default=0, metadata=option("Noise before rounding.", "STEPS", least=0))

    given: dict[str, Any] = {}

    @click.command()
    @options_of("convert", Dithered)
    def command(**options: Any) -> None:
        given.update(options)

    shown = CliRunner().invoke(command, ["--help"]).stdout
    assert "--dither STEPS" in shown and "Noise before rounding.  [x>=0]" in shown
    assert CliRunner().invoke(command, ["--dither", "3"]).exit_code == 0 and given["dither"] == 3

    without, job = (Dithered(plain.model, plain.profile, calibration="embedded", dither=steps) for steps in (0, 3))
    assert job.identity() == {**without.identity(), "dither": 3}
    arguments = [reproducing_arguments(each, checkpoint, reads_text=True) for each in (without, job)]
    assert set(arguments[1]) - set(arguments[0]) == {"--dither=3"}
    for wrong, words in ((-1, "0 at least"), ("3", "give a whole number")):
        with pytest.raises(ConvertError, match=words):
            Dithered(plain.model, plain.profile, dither=wrong)
