"""Files of others: nothing is replaced or deleted but what was written here, or named with --fresh."""

import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import converter
from converter.cli import main
from converter.gguf_target import GgufTarget
from converter.job import Job, Stopped, WorkDirectory, default_work_dir
from converter.ownership import Replaceable, check_places, locked_output, put_in_place, remove_replaced
from converter.pipeline import run
from converter.progress import Progress
from converter.write import JOURNAL, partial_path
from formats.errors import ConvertError
from formats.names import hidden_path
from profiles.rules import parse_override
from profiles.schema import load_profile

QUIET = Progress(quiet=True)
PLAIN = ["--profile", "uniform-8bit", "--no-quality"]
TEXT = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16"]


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> None:
    result = convert(*arguments)
    assert result.exit_code == 0, result.stderr


def refused(*arguments: object) -> str:
    """The message of a command that has to fail, in its three lines."""
    result = convert(*arguments)
    assert result.exit_code == 1 and result.stderr.count("\n") >= 3, result.output
    assert "\n  where: " in result.stderr and "\n  remedy: " in result.stderr and "Traceback" not in result.stderr
    return result.stderr


def snapshot(*roots: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


def job(model: Path, output: Path, profile: str = "uniform-8bit", **options) -> Job:
    return Job(str(model), load_profile(profile), output=output, quality=False, **options)


def stop_in_encode(conversion: Job, fresh: bool = False) -> None:
    """Run until some tensors are in the journal, and no further."""
    assert conversion.output is not None
    journal = (conversion.work_dir or default_work_dir(conversion.output)) / JOURNAL

    def should_stop() -> bool:
        return journal.exists() and len(journal.read_bytes().splitlines()) > 4

    with pytest.raises(Stopped):
        run(conversion, QUIET, should_stop, fresh)


# Work directories


@pytest.fixture
def home(tiny, tmp_path) -> Path:
    """A directory of somebody's, with names in it that a job might write, and a model."""
    home = tmp_path / "home"
    shutil.copytree(tiny("llama"), home / "model")
    for name in ("importance.gguf", "job.json", "lock", "report.html", "notes.txt", "source/code.py", "calibration/a"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text('{"tool": "mine"}')
    return home


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("place", ["", "model", "source", "calibration"])
def test_a_directory_of_somebody_is_no_work_directory(home, tmp_path, place, fresh):
    before = snapshot(home)
    model, text = home / "model", home / "notes.txt"
    arguments = [*PLAIN, *fresh, "--work-dir", home / place, "--output", tmp_path / "m.gguf", model]
    assert "--work-dir" in refused(*arguments)
    options = ["--calibration", text, "--output", tmp_path / "i.gguf", "--work-dir", home / place]
    assert "--work-dir" in refused("imatrix", *fresh, *options, model)
    assert snapshot(home) == before and not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("content", [[], ["lock"], [".job.json.tmp", "lock"]])
def test_an_empty_directory_and_one_that_a_run_was_killed_in_will_do(tiny, tmp_path, content):
    (tmp_path / "work").mkdir()
    for name in content:
        (tmp_path / "work" / name).touch()
    done(*PLAIN, "--work-dir", tmp_path / "work", "--output", tmp_path / "m.gguf", tiny("llama"))


def test_a_work_directory_holds_no_input_and_no_output(tiny, tmp_path):
    """What --fresh would delete, or what is named like it."""
    model, work, output = tiny("llama"), tmp_path / "m.bitwright", tmp_path / "m.gguf"
    done("imatrix", *TEXT, "--work-dir", work, "--output", tmp_path / "i.gguf", model)
    matrix = work / "importance.gguf"
    (work / "text.txt").write_text("a text " * 4000)
    before = snapshot(tmp_path)
    for options in (["--imatrix", matrix], ["--calibration", work / "text.txt"], ["--sensitivity", matrix]):
        for fresh in ([], ["--fresh"]):
            assert "the work directory holds" in refused(*fresh, *options, "--output", output, model)
    for fresh in ([], ["--fresh"]):
        message = refused(*PLAIN, *fresh, "--work-dir", work, "--output", work / "m.gguf", model)
        assert f"the work directory holds {work / 'm.gguf'}" in message
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(work)  # by another name
        assert "holds" in refused(*fresh, "--imatrix", tmp_path / "link" / matrix.name, "--output", output, model)
        (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_a_work_directory_inside_of_the_directory_that_is_written(tiny, tmp_path):
    message = refused("--profile", "fp8", "--work-dir", tmp_path / "a/w", "--output", tmp_path / "a", tiny("llama"))
    assert "lies in the output" in message and not (tmp_path / "a" / "w").exists()


def test_fresh_deletes_what_the_stages_keep_and_nothing_else(tiny, tmp_path):
    arguments = [*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama")]
    done(*arguments)
    work = tmp_path / "m.bitwright"
    stale, moved = work / "calibration", tmp_path / "elsewhere"
    stale.mkdir()
    (stale / "stream.npz").write_text("stale")
    moved.mkdir()
    (moved / "code.py").write_text("mine")
    (work / "moments").symlink_to(moved)
    for name in ("notes.txt", "plans/plan.json"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("mine")
    journal = (work / JOURNAL).stat().st_mtime_ns
    done("--fresh", *arguments)
    assert not stale.exists() and (work / JOURNAL).stat().st_mtime_ns > journal
    assert not (work / "moments").is_symlink() and (moved / "code.py").read_text() == "mine"
    assert (work / "notes.txt").read_text() == (work / "plans" / "plan.json").read_text() == "mine"


def test_a_damaged_description_can_be_started_over(tiny, tmp_path):
    arguments = [*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama")]
    done(*arguments)
    description = tmp_path / "m.bitwright" / "job.json"
    description.write_bytes(description.read_bytes()[:200])
    assert "start again with --fresh" in refused(*arguments)
    done("--fresh", *arguments)
    description.write_bytes(b"\0" * 300)  # nothing tells any more whose it is
    assert "no job of this tool" in refused("--fresh", *arguments)


def test_two_outputs_never_share_a_work_directory():
    names = [
        "m",
        "m.gguf",
        "m.dat",
        "m.dat.gguf",
        "m.bitwright",
        "m.bitwright.gguf",
        "m.gguf.gguf",
        "m-00001-of-00002.gguf",
    ]
    assert len({default_work_dir(Path(name)) for name in names}) == len(names)
    long = default_work_dir(Path("x" * 250 + ".gguf"))
    assert len(long.name) <= 255 and long != default_work_dir(Path("x" * 249 + "y.gguf"))


def test_a_directory_and_a_file_of_one_name(tiny, tmp_path):
    """--fresh on the one leaves the other's work alone."""
    text = ["--calibration", "embedded"]
    done(*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama"))
    file_work = snapshot(tmp_path / "m.bitwright")
    for fresh in ([], ["--fresh"]):
        done("--profile", "fp8", "--no-quality", *text, *fresh, "--output", tmp_path / "m", tiny("llama"))
    assert snapshot(tmp_path / "m.bitwright") == file_work
    done(*PLAIN, "--output", tmp_path / "m.gguf", tiny("llama"))
    assert (tmp_path / "m" / "bitwright.json").exists()


# Outputs


@pytest.mark.parametrize("split", [None, 60_000])
def test_a_resumed_job_does_not_replace_what_came_in_its_place(tiny, tmp_path, split):
    model, directory = tiny("llama"), tmp_path / "a"
    conversion = job(model, directory / "m.gguf", shard_bytes=split)
    stop_in_encode(conversion)
    whole = job(model, tmp_path / "whole" / "m.gguf", shard_bytes=split)
    run(whole, QUIET)
    names = [path.name for path in (tmp_path / "whole").glob("*.gguf")]
    assert len(names) == 1 if split is None else len(names) > 2
    taken = directory / sorted(names)[-1]
    for content in ("precious", None):
        if content is None:  # another job's, with the same model
            run(job(model, tmp_path / "b" / "m.gguf", overrides=(parse_override("mlp_down=Q6_K", "gguf"),)), QUIET)
            shutil.copy(tmp_path / "b" / "m.gguf", taken)
        else:
            taken.write_text(content)
        before = taken.read_bytes()
        with pytest.raises(ConvertError, match="is not of this job: a ") as error:
            run(conversion, QUIET)
        assert str(taken) in error.value.where and "--output" in error.value.remedy
        assert taken.read_bytes() == before
    taken.unlink()
    run(conversion, QUIET)
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in directory.iterdir()} == {*names, "m.bitwright"}


def test_a_resumed_directory_does_not_replace_what_came_in_its_place(tiny, tmp_path):
    model, output = tiny("llama"), tmp_path / "a"
    conversion = job(model, output, "fp8", calibration="embedded")
    stop_in_encode(conversion)
    run(job(model, tmp_path / "other", "W8A16", calibration="embedded"), QUIET)
    shutil.copytree(tmp_path / "other", output)
    before = snapshot(output)
    with pytest.raises(ConvertError, match="a directory that this tool wrote"):
        run(conversion, QUIET)
    assert snapshot(output) == before
    shutil.rmtree(output)
    output.mkdir()
    (output / "precious").write_text("mine")
    with pytest.raises(ConvertError, match="is not of this job"):
        run(conversion, QUIET)
    assert (output / "precious").read_text() == "mine"
    (output / "precious").unlink()  # an empty directory is in nobody's way
    run(conversion, QUIET)
    assert (output / "bitwright.json").exists()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith((".a", "a"))} == {"a", "a.bitwright-work"}


def test_what_appears_at_the_last_moment_stays(tiny, tmp_path, monkeypatch):
    """Between the last look and the renaming."""
    output, link = tmp_path / "m.gguf", os.link

    def late(source, target, **options):
        if Path(target) == output:
            output.write_text("precious")
        link(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", late)
        assert "is not of this job" in refused(*PLAIN, "--output", output, tiny("llama"))
    assert output.read_text() == "precious" and partial_path(output).exists()
    output.unlink()
    done(*PLAIN, "--output", output, tiny("llama"))
    assert output.read_bytes()[:4] == b"GGUF" and not partial_path(output).exists()


def test_fresh_replaces_what_was_there_then(tiny, tmp_path):
    """Until the new one is whole the old one stays; a run without --fresh completes it; what came later is not it."""
    model, output = tiny("llama"), tmp_path / "m.gguf"
    output.write_text("old")
    conversion = job(model, output)
    stop_in_encode(conversion, fresh=True)
    assert output.read_text() == "old"
    output.unlink()
    output.write_text("new")
    with pytest.raises(ConvertError, match="is not of this job"):
        run(conversion, QUIET)
    assert output.read_text() == "new"
    stop_in_encode(conversion, fresh=True)
    run(conversion, QUIET)
    assert output.read_bytes()[:4] == b"GGUF"
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m.bitwright"}


def test_a_replacement_that_is_killed_half_way_is_completed(tmp_path):
    """A file is moved aside, then the new one takes its name, then the old one goes: killed after each of these."""
    path, new = tmp_path / "m.gguf", tmp_path / ".m.gguf.partial"
    aside = hidden_path(path, "replaced")
    path.write_text("old")
    replaceable = Replaceable(tmp_path / "record.json")
    replaceable.allow([path])
    new.write_text("new")
    path.rename(aside)
    put_in_place(new, path, Replaceable(tmp_path / "record.json"))
    assert path.read_text() == "new" and not aside.exists() and not new.exists()

    os.link(path, new)  # the new one has its name, and the one it grew under
    aside.write_text("somebody's")
    put_in_place(new, path, replaceable)
    remove_replaced(path, replaceable)
    assert path.read_text() == "new" and not new.exists() and aside.read_text() == "somebody's"

    (tmp_path / "record.json").write_text("[damaged")
    new.write_text("newer")
    with pytest.raises(ConvertError, match="is not of this job"):
        put_in_place(new, path, Replaceable(tmp_path / "record.json"))
    assert path.read_text() == "new"


def test_names_are_taken_without_hard_links_too(tmp_path, monkeypatch):
    def unsupported(*arguments, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    (tmp_path / "new").write_text("new")
    put_in_place(tmp_path / "new", tmp_path / "name", Replaceable())
    assert (tmp_path / "name").read_text() == "new" and not (tmp_path / "new").exists()
    (tmp_path / "new").write_text("newer")
    with pytest.raises(ConvertError, match="is not of this job"):
        put_in_place(tmp_path / "new", tmp_path / "name", Replaceable())
    assert (tmp_path / "name").read_text() == "new"


def test_fresh_on_a_directory_with_files_of_the_user(tiny, tmp_path):
    output = tmp_path / "a"
    arguments = ["--profile", "fp8", "--no-quality", "--calibration", "embedded", "--output", output, tiny("llama")]
    done(*arguments)
    for name in ("README.md", "mine/a.txt"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        before = snapshot(tmp_path)
        assert f"did not write, and is not replaced: {name.split('/')[0]}" in refused("--fresh", *arguments)
        assert snapshot(tmp_path) == before
        done(*arguments)  # it is done, and says so
        shutil.move(output / name.split("/")[0], tmp_path / "kept")
        shutil.rmtree(tmp_path / "kept") if (tmp_path / "kept").is_dir() else (tmp_path / "kept").unlink()
    before = (output / "config.json").stat().st_ino
    done("--fresh", *arguments)
    assert (output / "config.json").stat().st_ino != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".a")]


def test_links_and_directories_in_the_place_of_an_output(tiny, tmp_path):
    model = tiny("llama")
    (tmp_path / "m.gguf").mkdir()
    for fresh in ([], ["--fresh"]):
        assert "a directory" in refused(*PLAIN, *fresh, "--output", tmp_path / "m.gguf", model)
    (tmp_path / "l.gguf").symlink_to("nowhere")
    assert "a link to nowhere" in refused(*PLAIN, "--output", tmp_path / "l.gguf", model)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("mine")
    (tmp_path / "d").symlink_to("real")
    for fresh in ([], ["--fresh"]):
        assert "a link to real" in refused("--profile", "fp8", *fresh, "--output", tmp_path / "d", model)
    os.mkfifo(tmp_path / "f.gguf")
    assert "no regular file" in refused(*PLAIN, "--fresh", "--output", tmp_path / "f.gguf", model)
    assert (tmp_path / "real" / "x").read_text() == "mine"


# Two at once


def hold_and_die(path: Path) -> None:
    with locked_output(path):
        os._exit(9)


def test_one_output_is_written_by_one_process(tiny, tmp_path):
    output = tmp_path / "m.gguf"
    arguments = [*PLAIN, "--work-dir", tmp_path / "work", "--output", output, tiny("llama")]
    with locked_output(output), locked_output(tmp_path / "other.gguf"):
        assert "another process is writing this output" in refused(*arguments)
        assert "is writing this output" in refused("imatrix", *TEXT, "--output", output, tiny("llama"))
    process = multiprocessing.get_context("forkserver").Process(target=hold_and_die, args=(output,))
    process.start()
    process.join()
    assert process.exitcode == 9 and hidden_path(output, "lock").exists()
    done(*arguments)
    assert not hidden_path(output, "lock").exists()
    second = ["--profile", "balanced-4bit", "--no-quality", "--work-dir", tmp_path / "second", "--output", output]
    before = output.read_bytes()
    assert "is not of this job: a GGUF" in refused(*second, *TEXT, tiny("llama"))
    assert output.read_bytes() == before


def test_a_lock_that_was_removed_meanwhile_locks_nothing(tmp_path):
    """Many take it in turns: the file of the lock comes and goes, and no two hold it at once."""
    holders, most, taken = [0], [0], [0]
    guard = threading.Lock()

    def take(_: int) -> None:
        while True:
            try:
                with locked_output(tmp_path / "m"):
                    with guard:
                        holders[0] += 1
                        most[0] = max(most[0], holders[0])
                        taken[0] += 1
                    with guard:
                        holders[0] -= 1
                return
            except ConvertError:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(200)))
    assert most == [1] and taken == [200] and not list(tmp_path.iterdir())


def test_jobs_with_outputs_of_their_own_run_side_by_side(tiny, tmp_path):
    def one(name: str) -> str:
        options = {"profile": "uniform-8bit", "quality": False, "quiet": True, "output": tmp_path / name}
        return converter.convert(str(tiny("llama")), **options)["artifact"]["files"][0]["sha256"]

    tiny("llama")
    with ThreadPoolExecutor(2) as pool:
        hashes = list(pool.map(one, ["a.gguf", "b.gguf"]))
    assert hashes[0] == hashes[1] and (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_a_report_is_of_its_own_jobs_files(tiny, tmp_path, monkeypatch, profile):
    """The artifact is exchanged for a sound one of another job while it is looked at."""
    from converter.directory_target import DirectoryTarget

    model, output = tiny("llama"), tmp_path / ("m.gguf" if profile == "uniform-8bit" else "m")
    other, target = tmp_path / "other" / output.name, GgufTarget if output.suffix else DirectoryTarget
    overrides = ["--set", "mlp_down=Q6_K" if output.suffix else "mlp_down=FP8_BLOCK"]
    options = ["--no-quality", "--profile", profile, "--calibration", "embedded"]
    done(*options, *overrides, "--output", other, model)
    complete = target.complete

    def exchanged(self, adapted, paths):
        paths = complete(self, adapted, paths)
        if output.is_dir():
            shutil.rmtree(output)
            shutil.copytree(other, output)
        else:
            shutil.copy(other, output)
        return paths

    with monkeypatch.context() as patch:
        patch.setattr(target, "complete", exchanged)
        assert "changed or replaced meanwhile" in refused(*options, "--output", output, model)
    assert not (default_work_dir(output) / "report.json").exists()
    assert "is not of this job" in refused(*options, "--output", output, model)
    done(*options, "--fresh", "--output", output, model)
    files = json.loads((default_work_dir(output) / "report.json").read_text())["artifact"]["files"]
    assert {Path(file["path"]).parent for file in files} <= {output, output.parent}


# Inputs


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    """A GGUF in F32, a source of conversions."""
    path = tmp_path / "source.gguf"
    done("--profile", "uniform-8bit", "--set", "*=F32", "--no-quality", "--output", path, tiny("llama"))
    shutil.rmtree(default_work_dir(path))
    return path


def test_an_input_is_never_an_output(tiny, tmp_path, source):
    link, hard = tmp_path / "link.gguf", tmp_path / "hard.gguf"
    link.symlink_to(source)
    os.link(source, hard)
    before = snapshot(tmp_path)
    for output in (source, link, hard, tmp_path / "." / "source.gguf"):
        for fresh in ([], ["--fresh"]):
            assert "would replace what is read" in refused(*PLAIN, *fresh, "--output", output, source)
            assert "would replace what is read" in refused("imatrix", *TEXT, *fresh, "--output", output, source)
    assert snapshot(tmp_path) == before
    done(*PLAIN, "--output", tmp_path / "m.gguf", source)

    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = snapshot(model)
    for output in (model, tmp_path):
        for fresh in ([], ["--fresh"]):
            message = refused("--profile", "fp8", *fresh, "--output", output, model)
            assert "would replace what is read" in message
    for name in ("config.json", "README.md"):
        (model / "README.md").touch()
        assert "would replace" in refused("imatrix", *TEXT, "--fresh", "--output", model / name, model)
    assert snapshot(model) == {**before, model / "README.md": b""}


def test_a_model_may_be_converted_where_it_lies(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = snapshot(model)
    monkeypatch.chdir(model)
    for _ in range(2):
        done(*PLAIN, ".")
    done("--fresh", *PLAIN, ".")
    assert len(list(model.glob("*.gguf"))) == 1
    assert before.items() <= snapshot(model).items()


def test_places_are_compared_as_they_are_on_the_disk(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConvertError, match="would replace what is read"):
        check_places([tmp_path / "a" / "x"], [tmp_path / "b" / "x"])
    with pytest.raises(ConvertError, match="the work directory holds"):
        check_places([tmp_path / "a" / "x"], [tmp_path / "y"], tmp_path / "b")
    with pytest.raises(ConvertError, match="256 bytes, and file systems take 255"):
        check_places([], [tmp_path / ("é" * 128)])
    check_places([tmp_path / "a" / "x"], [tmp_path / "y"], tmp_path / "c")


# Other commands


def test_an_importance_matrix_is_replaced_when_it_is_this_commands_own(tiny, tmp_path):
    output = tmp_path / "i.gguf"
    arguments = ["imatrix", *TEXT, "--output", output, tiny("llama")]
    output.write_text("precious")
    assert "is not of this job: a file of 8 B" in refused(*arguments)
    assert output.read_text() == "precious"
    done(*arguments, "--fresh")
    first = output.read_bytes()
    done(*arguments)  # again: the same command, the same file
    assert output.read_bytes() == first
    shutil.rmtree(default_work_dir(output))
    output.write_bytes(first + b"x")  # of ours, and nothing says that it is of this job
    assert "is not of this job: a GGUF" in refused(*arguments)
    assert output.read_bytes() == first + b"x"

    # From one format into the other.
    output.write_bytes(first)
    other = tmp_path / "i.dat"
    for _ in range(2):
        done("imatrix", "--output", other, output)
    second = other.read_bytes()
    other.write_text("precious")
    assert "is not of this job" in refused("imatrix", "--output", other, output)
    assert other.read_text() == "precious"
    assert "would replace what is read" in refused("imatrix", "--fresh", "--output", output, output)
    done("imatrix", "--fresh", "--output", other, output)
    assert other.read_bytes() == second
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_activation_statistics_do_not_replace_a_file(tiny, tmp_path):
    output = tmp_path / "a.safetensors"
    output.write_text("precious")
    arguments = ["imatrix", "--activations", *TEXT, "--output", output, tiny("llama")]
    assert "is not of this job" in refused(*arguments)
    output.unlink()
    done(*arguments)
    done(*arguments)


def test_a_picture_replaces_a_picture(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    done(*PLAIN, "--output", path, tiny("llama"))
    for name in ("p.svg", "p.html"):
        picture = tmp_path / name
        done("inspect", path, "--plot", picture)
        first = picture.read_bytes()
        picture.write_bytes(first[:-1])
        done("inspect", path, "--plot", picture)
        assert picture.read_bytes() == first
        for content in ("<svg>mine</svg>", ""):
            picture.write_text(content)
            assert "with --plot" in refused("inspect", path, "--plot", picture)
            assert picture.read_text() == content
    report = tmp_path / "m.bitwright" / "report.html"
    before = report.read_bytes()
    assert "is not of this job" in refused("inspect", path, "--plot", report)
    assert report.read_bytes() == before


def test_a_split_replaces_no_file_that_comes_while_it_runs(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    done(*PLAIN, "--output", path, tiny("llama"))
    link = os.link

    def late(source, target, **options):
        if "-00002-of-" in str(target):
            Path(target).write_text("precious")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", late)
    assert "cannot be written" in refused("split", path, "--split-size", "60K")
    (second,) = tmp_path.glob("m-00002-of-*.gguf")
    assert second.read_text() == "precious"


# Names of models


def hostile_card(model: Path) -> None:
    (model / "README.md").write_text(
        '---\nmodel_name: "../../../evil"\nversion: "../x"\nfinetune: "..\\\\y\\u0000z"\n---\n'
    )


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_a_model_does_not_decide_where_it_is_written(tiny, tmp_path, monkeypatch, profile):
    (tmp_path / "a" / "b").mkdir(parents=True)
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    hostile_card(model)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = snapshot(tmp_path)
    done("--profile", profile, "--no-quality", "--calibration", "embedded", model)
    written = set(snapshot(tmp_path)) - set(before)
    assert written and all(path.is_relative_to(tmp_path / "a" / "b") for path in written)
    top = {path.relative_to(tmp_path / "a" / "b").parts[0] for path in written}
    assert len(top) == 2 and any(name.startswith("evil") for name in top)


def test_a_gguf_does_not_decide_where_it_is_written(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    hostile_card(model)
    done("--profile", "uniform-8bit", "--set", "*=F32", "--no-quality", "--output", tmp_path / "f32.gguf", model)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = snapshot(tmp_path)
    done(*PLAIN, tmp_path / "f32.gguf")
    written = set(snapshot(tmp_path)) - set(before)
    assert written and all(path.is_relative_to(tmp_path / "a" / "b") for path in written)


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_long_names(tiny, tmp_path, monkeypatch, profile):
    """Of the model, and of the output: what is kept beside an output has names that fit."""
    model = shutil.copytree(tiny("llama"), tmp_path / ("é" * 120 + "12345"))
    assert len(model.name.encode()) == 245
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--profile", profile, "--no-quality", "--calibration", "embedded"]
    done(*options, "--split-size", "60K", model)
    end = ".gguf" if profile == "uniform-8bit" else ""
    output = tmp_path / "there" / ("x" * (245 - len(end)) + end)
    done(*options, "--output", output, model)
    done(*options, "--fresh", "--output", output, model)
    assert {path.name for path in output.parent.iterdir()} == {output.name, default_work_dir(output).name}
    too_long = tmp_path / "there" / ("x" * (256 - len(end)) + end)
    assert "256 bytes" in refused(*options, "--output", too_long, model)


def test_a_work_directory_is_cleared_by_the_names_that_are_written_in_it(tmp_path):
    """Every name that a module puts into a work directory is known to `clear`, or a stale result would stay."""
    import ast
    import importlib

    import converter.job as job_module

    found = {}
    for path in Path(converter.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
                continue
            place = ast.unparse(node.left)
            if place.split(".")[-1] != "work_dir" and place != "work.path":
                continue
            if isinstance(node.right, ast.Constant):
                found[node.right.value] = path.name
            elif isinstance(node.right, ast.Name) and node.right.id.isupper():
                found[getattr(importlib.import_module(f"converter.{path.stem}"), node.right.id)] = path.name
    assert len(found) > 20
    assert {name: of for name, of in found.items() if name not in job_module._KEPT} == {}
    work = WorkDirectory(tmp_path / "work")
    with work.locked():
        work.claim({"tool": "1.0+0123456789ab"})
        for name in found:
            (work.path / name).write_text("kept")
        work.clear()
        assert {path.name for path in work.path.iterdir()} == {"job.json", "lock"}
