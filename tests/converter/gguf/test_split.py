"""`bitwright split`: the files are those that `bitwright --split-size` writes."""

import json
import os
from pathlib import Path

from click.testing import CliRunner, Result

from bitwright.converter.cli import main
from bitwright.converter.job.work_directory import default_work_dir
from bitwright.formats.files.seals import is_sound, write_sealed
from tests.converter.commands import TEXT


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_split_afterwards_is_split_at_once(tiny, tmp_path):
    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--set", "mlp_down=NVFP4", *TEXT, tiny("llama-256")]
    whole, at_once = tmp_path / "whole" / "m.gguf", tmp_path / "at-once" / "m.gguf"
    assert convert("--output", whole, *arguments).exit_code == 0
    assert convert("--output", at_once, "--split-size", "500K", *arguments).exit_code == 0
    done = convert("split", whole, "--split-size", "500K")
    assert done.exit_code == 0, done.stderr
    shards = [Path(line) for line in done.stdout.split()]
    expected = sorted(at_once.parent.glob("*.gguf"))
    assert len(shards) > 2 and [path.name for path in shards] == [path.name for path in expected]
    assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in expected]
    assert all(path.stat().st_size <= 500_000 for path in shards)
    assert convert("verify", shards[0], "--against", tiny("llama-256")).exit_code == 0

    names = {whole: "report-split.json", at_once: "report.json"}
    reports = [json.loads((default_work_dir(path) / name).read_text()) for path, name in names.items()]
    for report in reports:
        report["artifact"]["files"] = [{**f, "path": Path(f["path"]).name} for f in report["artifact"]["files"]]
    assert reports[0]["artifact"] == reports[1]["artifact"]
    assert reports[0]["arguments"] == reports[1]["arguments"]
    # The job is still done, and knows it.
    again = convert("--output", whole, *arguments)
    assert again.exit_code == 0 and "already done" in again.stderr


def test_what_cannot_be_split(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    assert convert("--output", path, "--profile", "uniform-8bit", "--judge", "off", tiny("llama")).exit_code == 0
    fits = convert("split", path, "--split-size", "20GB")
    assert fits.exit_code == 1 and "nothing is to be done" in fits.stderr
    first = Path(convert("split", path, "--split-size", "60K").stdout.split()[0])
    again = convert("split", path, "--split-size", "60K")
    assert again.exit_code == 0 and Path(again.stdout.split()[0]) == first  # all of it is there
    last = Path(again.stdout.split()[-1])
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert "another file is there already" in convert("split", path, "--split-size", "60K").stderr
    assert "one of several splits" in convert("split", first, "--split-size", "30K").stderr
    assert "no size" in convert("split", path, "--split-size", "many").stderr


def test_a_report_that_is_not_the_artifact_s_stops_before_a_byte_is_written(tiny, tmp_path):
    path, other = tmp_path / "m.gguf", tmp_path / "other" / "m.gguf"
    arguments = ["--profile", "uniform-8bit", "--judge", "off", tiny("llama")]
    assert convert("--output", path, *arguments).exit_code == 0
    assert convert("--output", other, *arguments, "--set", "mlp_down=F16").exit_code == 0
    report = default_work_dir(path) / "report.json"
    content = report.read_bytes()

    def refused(*arguments: object) -> str:
        done = convert("split", path, "--split-size", "60K", *arguments, "--verbose")
        assert done.exit_code == 1 and [p.name for p in tmp_path.glob("*.gguf")] == ["m.gguf"]
        return done.stderr

    for changed in (content[:-10], content.replace(b"uniform-8bit", b"uniform-9bit"), b'{"a": 1}', b"[]", None):
        report.unlink()
        if changed is None:
            os.mkfifo(report)
        else:
            report.write_bytes(changed)
        assert "it makes them anew" in refused()
    report.unlink()
    for changed in (b'{"a": 1}', b"[]", b"{"):
        write_sealed(report, "report", changed)
        assert "it makes them anew" in refused()
    write_sealed(report, "report", content)
    assert "the report is of another artifact" in refused("--work-dir", default_work_dir(other))
    split = report.with_name("report-split.json")
    for size in ("60K", "60K", "40K"):
        assert convert("split", path, "--split-size", size).exit_code == 0
        assert is_sound(split) and report.read_bytes() == content
        shards = [Path(file["path"]) for file in json.loads(split.read_text())["artifact"]["files"]]
        assert all(shard.exists() for shard in shards)
    assert (
        "the report is of another artifact"
        in convert("split", other, "--split-size", "40K", "--work-dir", default_work_dir(path)).stderr
    )
