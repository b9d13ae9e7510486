"""What is decided before the first stage, and the seam between the stages and the two kinds of artifact."""

import inspect

import pytest

from bitwright.converter.artifact.layout import partial_path
from bitwright.converter.artifact.target import Target
from bitwright.converter.job.job import Job
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.converter.preparation import TARGETS, prepare, survey
from bitwright.profiles.reading.schema import load_profile

KINDS = [("uniform-8bit", ".gguf"), ("fp8", "")]


@pytest.mark.parametrize(("profile", "suffix"), KINDS)
def test_a_run_has_its_paths_decided_and_writes_nothing(tiny, tmp_path, monkeypatch, profile, suffix):
    monkeypatch.chdir(tmp_path)
    run = survey(Job(str(tiny("llama")), load_profile(profile)))
    assert run.output.suffix == suffix and run.work_dir == default_work_dir(run.output)
    assert (run.job.output, run.job.work_dir) == (run.output, run.work_dir)
    assert run.progress.quiet and not run.should_stop()
    assert list(tmp_path.iterdir()) == []
    named = Job(run.job.model, run.job.profile, output=tmp_path / f"m{suffix}", work_dir=tmp_path / "work")
    assert (survey(named).output, survey(named).work_dir) == (named.output, named.work_dir)


@pytest.mark.parametrize(("profile", "suffix"), KINDS)
def test_the_files_of_a_plan_are_known_to_the_byte(tiny, tmp_path, profile, suffix):
    output = tmp_path / f"m{suffix}"
    prepared = prepare(Job(str(tiny("llama-256")), load_profile(profile), output=output, shard_bytes=300_000))
    files, unplanned = prepared.files, prepared.target.files(prepared.run)
    assert unplanned.layouts == () and unplanned.growing == () and unplanned.outputs == (output,)
    assert len(files.layouts) > 1 and files.n_bytes == prepared.to_dict()["bytes"]
    assert files.is_directory == unplanned.is_directory == (suffix == "")
    if files.is_directory:
        assert files.outputs == (output,) and {path.parent for path in files.growing} == {partial_path(output)}
    else:
        assert files.growing == tuple(map(partial_path, files.outputs))


def test_shards_that_are_there_may_be_written_again(tiny, tmp_path):
    run = survey(Job(str(tiny("llama")), load_profile("uniform-8bit"), output=tmp_path / "m.gguf"))
    shards = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for path in (*shards, tmp_path / "other-00001-of-00002.gguf", tmp_path / "m-1-of-2.gguf"):
        path.touch()
    assert TARGETS["gguf"].files(run).outputs == (run.output, *shards)


def test_both_kinds_of_artifact_have_the_methods_of_the_seam_and_no_others():
    def methods(kind: type) -> dict[str, list[str]]:
        public = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(method).parameters) for name, method in public.items()}

    for target in TARGETS.values():
        assert methods(type(target)) == methods(Target)
