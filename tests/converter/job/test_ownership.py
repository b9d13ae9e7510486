"""Files of others: nothing is replaced but what was written here, or was there when --fresh was given."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitwright import converter
from bitwright.converter.artifact.layout import partial_path
from bitwright.converter.artifact.ownership import Replaceable, bring_back, locked_output, put_in_place, remove_replaced
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.gguf.target import GgufTarget
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import Stopped, default_work_dir
from bitwright.converter.pipeline import run
from bitwright.formats.errors import ConvertError
from bitwright.formats.names import hidden_path
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile
from tests.converter.commands import PLAIN, TEXT, done, refused, snapshot

QUIET = Progress(quiet=True)


def job(model: Path, output: Path, profile: str = "uniform-8bit", **options) -> Job:
    return Job(str(model), load_profile(profile), output=output, judge="off", **options)


def stop_in_encode(conversion: Job, fresh: bool = False) -> None:
    """Run until some tensors are in the journal, and no further."""
    assert conversion.output is not None
    journal = (conversion.work_dir or default_work_dir(conversion.output)) / JOURNAL

    def should_stop() -> bool:
        return journal.exists() and len(journal.read_bytes().splitlines()) > 4

    with pytest.raises(Stopped):
        run(conversion, QUIET, should_stop, fresh)


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


def test_what_a_killed_run_has_moved_aside_is_brought_back(tmp_path):
    path, aside = tmp_path / "m.gguf", hidden_path(tmp_path / "m.gguf", "replaced")
    path.write_text("old")
    replaceable = Replaceable()
    replaceable.allow([path])
    path.rename(aside)
    bring_back(path, replaceable)
    assert path.read_text() == "old" and not aside.exists()

    path.rename(aside)
    path.write_text("new")
    bring_back(path, replaceable)
    assert path.read_text() == "new" and not aside.exists()

    aside.write_text("somebody's")
    bring_back(path, replaceable)
    replaceable.allow([path])
    (tmp_path / "newer").write_text("newer")
    with pytest.raises(ConvertError, match="an earlier run has moved away") as error:
        put_in_place(tmp_path / "newer", path, replaceable)
    assert error.value.where == str(aside)
    assert path.read_text() == "new" and aside.read_text() == "somebody's"


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
    arguments = ["--profile", "fp8", "--judge", "off", "--calibration", "embedded", "--output", output, tiny("llama")]
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
    second = ["--profile", "balanced-4bit", "--judge", "off", "--work-dir", tmp_path / "second", "--output", output]
    before = output.read_bytes()
    assert "is not of this job: a GGUF" in refused(*second, *TEXT, tiny("llama"))
    assert output.read_bytes() == before


def test_an_output_where_nothing_can_be_locked(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked_output(tmp_path / "m"):
        assert hidden_path(tmp_path / "m", "lock").exists()
    assert not list(tmp_path.iterdir())


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
        options = {"profile": "uniform-8bit", "judge": "off", "quiet": True, "output": tmp_path / name}
        return converter.convert(str(tiny("llama")), **options)["artifact"]["files"][0]["sha256"]

    tiny("llama")
    with ThreadPoolExecutor(2) as pool:
        hashes = list(pool.map(one, ["a.gguf", "b.gguf"]))
    assert hashes[0] == hashes[1] and (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_a_report_is_of_its_own_jobs_files(tiny, tmp_path, monkeypatch, profile):
    """The artifact is exchanged for a sound one of another job while it is looked at."""
    from bitwright.converter.directory.target import DirectoryTarget

    model, output = tiny("llama"), tmp_path / ("m.gguf" if profile == "uniform-8bit" else "m")
    other, target = tmp_path / "other" / output.name, GgufTarget if output.suffix else DirectoryTarget
    overrides = ["--set", "mlp_down=Q6_K" if output.suffix else "mlp_down=FP8_BLOCK"]
    options = ["--judge", "off", "--profile", profile, "--calibration", "embedded"]
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


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
@pytest.mark.parametrize("ending", ["lock", "partial"])
def test_files_of_others_beside_the_output_stay(tiny, tmp_path, ending, kind, fresh):
    for output, options in (("m.gguf", PLAIN), ("m", ["--profile", "fp8", "--judge", "off", *TEXT])):
        foreign = hidden_path(tmp_path / output, ending)
        precious = tmp_path / f"precious-{output}"
        if kind == "directory":
            foreign.mkdir()
            precious = foreign / "x"
        elif kind == "link":
            foreign.symlink_to(precious)
        else:
            precious = foreign
        precious.write_text("precious")
        arguments = [*options, *fresh, "--output", tmp_path / output, tiny("llama")]
        message = refused(*arguments)
        assert str(foreign) in message and "--output" in message
        assert precious.read_text() == "precious" and os.path.lexists(foreign)
        assert not (tmp_path / output).exists()


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_what_another_job_has_begun_is_its_own(tiny, tmp_path, profile):
    """Two work directories, one output: the second leaves what the first can continue; each is told what to do."""
    model, output = tiny("llama"), tmp_path / ("m.gguf" if profile == "uniform-8bit" else "m")
    options = {"calibration": "embedded", "samples": 128, "sequence_length": 16}
    first = job(model, output, profile, work_dir=tmp_path / "first", **options)
    second = job(model, output, profile, work_dir=tmp_path / "second", **options)
    stop_in_encode(first)
    growing = partial_path(output)
    before = snapshot(growing) or growing.read_bytes()
    for fresh in (False, True):
        with pytest.raises(ConvertError, match="not of this work directory") as error:
            run(second, QUIET, fresh=fresh)
        assert error.value.where == str(growing)
        assert (snapshot(growing) or growing.read_bytes()) == before
    (tmp_path / "first" / "replaceable.json").unlink()  # what it holds is in the journal of the first
    run(first, QUIET)
    assert output.exists() and not growing.exists()


@pytest.mark.parametrize("profile", ["uniform-8bit", "fp8"])
def test_fresh_removes_what_its_own_job_has_begun(tiny, tmp_path, profile):
    model, output = tiny("llama"), tmp_path / ("m.gguf" if profile == "uniform-8bit" else "m")
    begun = job(model, output, profile, calibration="embedded", shard_bytes=60_000)
    stop_in_encode(begun)
    names = {path.name for path in tmp_path.iterdir()}
    assert any(name.endswith(".partial") for name in names)
    run(job(model, output, profile, calibration="embedded"), QUIET, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} == {output.name, default_work_dir(output).name}


DAMAGED_LISTS = [None, [1], [{"a": 1}], [{"path": 1, "sha256": "x"}], [{"path": "/etc/x", "sha256": "x"}], {}]


def test_a_damaged_list_of_files_is_of_no_whole_directory(tiny, tmp_path):
    arguments = ["--profile", "fp8", *TEXT, "--judge", "off", "--output", tmp_path / "a", tiny("llama")]
    done(*arguments)
    recipe = tmp_path / "a" / "bitwright.json"
    content = json.loads(recipe.read_text())
    (tmp_path / "a.bitwright-work" / "report.json").unlink()
    for files in (*DAMAGED_LISTS, [{"path": "../a/config.json", "sha256": "x"}]):
        recipe.write_text(json.dumps(content | {"files": files}))
        assert "is not of this job: a directory that this tool wrote" in refused(*arguments)
        assert "did not write, and is not replaced" in refused("--fresh", *arguments)
