"""--events and the log of a job: what a program, or whoever looks later, is told."""

import json
import re
from pathlib import Path

import pytest

from bitwright.converter import convert as convert_in_python
from bitwright.converter.job.progress import Progress
from bitwright.converter.record.events import KINDS, SCHEMA, VERSION
from bitwright.converter.record.log import LOG_FILE
from bitwright.formats.errors import ConvertError
from tests.converter.commands import PLAIN, TEXT, convert, refused

PAGE = Path(__file__).parents[3] / "docs" / "automation.md"


def events_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A directory with a small conversion, which said nothing on stderr, and its events."""
    directory = tmp_path_factory.mktemp("events")
    options = ["--profile", "balanced-4bit", "--no-analysis", "--no-error-feedback", "--judge", "off", *TEXT]
    arguments = [*options, "--events", directory / "events.jsonl", "-q", "--output", directory / "m.gguf"]
    done = convert(*arguments, tiny("llama-256"))
    assert done.exit_code == 0 and done.stderr == ""
    return directory, events_of(directory / "events.jsonl")


def test_a_conversion_tells_its_stages_its_files_and_its_verdict(converted):
    directory, events = converted
    first, last = events[0], events[-1]
    assert (first["event"], first["schema"], first["version"]) == ("begin", SCHEMA, VERSION)
    assert first["command"].split()[0] == "bitwright" and last["event"] == "done"
    started = [event["stage"] for event in events if event["event"] == "stage_start"]
    assert started == ["plan", "calibrate", "adapt", "encode", "verify"]
    assert [event["stage"] for event in events if event["event"] == "stage_end"] == started
    (artifact,) = (event for event in events if event["event"] == "artifact")
    written = Path(artifact["path"])
    assert written == directory / "m.gguf" and artifact["bytes"] == written.stat().st_size
    assert [event["verdict"] for event in events if event["event"] == "verdict"] == [None]
    times = [event["time"] for event in events]
    assert times == sorted(times)


def test_progress_reaches_its_end_in_each_part(converted):
    _, events = converted
    progress = [event for event in events if event["event"] == "progress"]
    for what in {event["what"] for event in progress}:
        *_, last = (event for event in progress if event["what"] == what)
        assert last["done"] == last["total"] > 0
    assert {"calibrate", "encode", "verify"} <= {event["what"] for event in progress}


def test_every_event_and_every_key_is_documented(converted):
    _, events = converted
    text = PAGE.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert set(KINDS) <= set(rows)
    for event in events:
        documented = set(re.findall(r"`(\w+)`", rows[event["event"]])) | {"event", "time"}
        assert set(event) <= documented, event
    assert f'"version": {VERSION}' in text


def test_the_log_has_what_was_said_and_stays_beside_the_results(converted):
    directory, _ = converted
    log = (directory / "m.bitwright" / LOG_FILE).read_text()
    assert "bitwright" in log.splitlines()[0].split() and "calibrate took" in log and "forecast: " in log
    assert all(re.match(r"\d{4}-\d\d-\d\dT|    ", line) for line in log.splitlines())


def test_an_error_is_an_event_and_says_where_its_log_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cretS3cret")
    events = tmp_path / "events.jsonl"

    def fails(*_: object) -> None:
        raise ConvertError("the disk s3cretS3cret is on fire", "here", "put it out")

    monkeypatch.setattr("bitwright.converter.gguf.target.verify", fails)
    arguments = [*PLAIN, "--events", events, "--output", tmp_path / "m.gguf", tiny("llama")]
    log = tmp_path / "m.bitwright" / LOG_FILE
    assert f"\n  log: {log}" in refused(*arguments)
    assert "Traceback" in log.read_text() and "s3cretS3cret" not in log.read_text()
    last = events_of(events)[-1]
    assert (last["event"], last["exit_code"], last["log"]) == ("error", 1, str(log))
    assert last["what"] == "the disk *** is on fire" and last["remedy"] == "put it out"
    failed = convert(*arguments, "--json")
    assert json.loads(failed.stdout)["error"]["log"] == str(log)


def test_options_that_make_no_sense_are_an_event_too(tiny, tmp_path):
    refused("--profile", "Q4_K_N", "--events", tmp_path / "e.jsonl", tiny("llama"))
    assert [event["event"] for event in events_of(tmp_path / "e.jsonl")] == ["begin", "error"]


def test_a_finished_job_tells_its_artifact_again(converted, tiny):
    directory, before = converted
    options = ["--profile", "balanced-4bit", "--no-analysis", "--no-error-feedback", "--judge", "off", *TEXT]
    again = directory / "again.jsonl"
    done = convert(*options, "--events", again, "--output", directory / "m.gguf", tiny("llama-256"))
    assert done.exit_code == 0, done.stderr
    kept = [event for event in events_of(again) if event["event"] == "artifact"]
    told = [event for event in before if event["event"] == "artifact"]
    assert [event["sha256"] for event in kept] == [event["sha256"] for event in told]


def test_a_full_disk_under_the_events_ends_no_job(tiny, tmp_path):
    arguments = [*PLAIN, "--events", "/dev/full", "--output", tmp_path / "m.gguf", tiny("llama")]
    assert convert(*arguments).exit_code == 0 and (tmp_path / "m.gguf").exists()


def test_events_that_cannot_be_opened_are_refused(tiny, tmp_path):
    assert "--events" in refused(*PLAIN, "--events", tmp_path / "no" / "events", tiny("llama"))


def test_python_and_imatrix_tell_the_same(tiny, tmp_path):
    events = tmp_path / "events.jsonl"
    options = {"judge": "off", "output": tmp_path / "m.gguf", "events": str(events), "quiet": True}
    convert_in_python(tiny("llama"), "uniform-8bit", **options)
    assert [event["event"] for event in events_of(events)][-1] == "done"
    done = convert("imatrix", *TEXT, "--events", events, "--output", tmp_path / "i.gguf", tiny("llama"))
    assert done.exit_code == 0, done.stderr
    both = events_of(events)
    assert [event["event"] for event in both].count("begin") == 2, "they are appended"
    assert both[-2]["stage"] == "calibrate" and (tmp_path / "i.bitwright" / LOG_FILE).exists()


def test_the_compiler_is_heard_once(capsys):
    import logging

    progress = Progress()
    with progress.recorded(None, "bitwright"):
        with progress.stage("encode") as was_done:
            assert was_done()
            for name in ("a", "b"):
                logging.getLogger("bitwright.formats.compiler").info("compiling %s", name)
            assert not was_done(), "the time of this stage says nothing of the next"
        logging.getLogger("bitwright.formats.compiler").warning("a file is damaged")
    said = capsys.readouterr().err
    assert said.count("compiling kernels") == 1 and "warning: a file is damaged" in said


def test_what_judges_an_artifact_tells_its_events(converted, tiny, tmp_path):
    artifact, model = converted[0] / "m.gguf", tiny("llama-256")
    few = ["--samples", 1, "--sequence-length", 16]
    for command, options, part in (("evaluate", few, "compare"), ("verify", [], "verify")):
        path = tmp_path / f"{command}.jsonl"
        done = convert(command, artifact, "--against", model, *options, "--events", path, "-q")
        assert done.exit_code == 0, done.stderr
        events = events_of(path)
        assert [events[0]["event"], events[-1]["event"]] == ["begin", "done"]
        assert part in {event["what"] for event in events if event["event"] == "progress"}
