"""The report as it is written and read: what a conversion left comes back, and nothing else passes for one."""

import json
from dataclasses import replace
from typing import Any

import pytest

from bitwright.converter.report.data import PublishedReport, Report
from tests.converter.report.reports import AGREEMENT, COHERENCE, answer, report


def plain(**changes: Any) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(report(**changes).to_dict()))
    return written


def of_files(*paths: str) -> dict[str, Any]:
    return {"kind": "gguf", "bytes": 1, "files": [{"path": path, "bytes": 1, "sha256": ""} for path in paths]}


def test_a_report_comes_back_as_it_was_written():
    whole = report(coherence=replace(COHERENCE, prompts=(answer("loop", "flat"),)), agreement=AGREEMENT)
    assert PublishedReport.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert "path" not in whole.to_dict() and "kv_cache" not in whole.to_dict()


def test_what_only_directories_have_is_there_even_when_it_is_nothing():
    directory = report(smoothing=None, activations=None, precision=(), kv_cache=())
    written = directory.to_dict()
    assert [written[key] for key in ("smoothing", "activations", "precision", "kv_cache")] == [None, None, [], []]
    assert PublishedReport.from_dict(written) == directory


def test_a_report_of_another_version():
    """It may lack what may be null, and what it has besides is not known, so not written again."""
    written = plain()
    for key in ("agreement", "tasks", "better"):
        del written[key]
    read = PublishedReport.from_dict({**written, "colour": "green"})
    assert read == report() and "colour" not in read.to_dict()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model": 1}, "the report.model"),
        ({"verdict": "fine"}, "the report.verdict"),
        ({"errors": [{}]}, "the report.errors.0.tensor"),
        ({"errors": []}, "at least"),
        ({"groups": []}, "at least"),
        ({"seconds": {"plan": "long"}}, "the report.seconds.plan"),
        ({"quality": {"perplexity": 1.0}}, "the report.quality"),
        ({"recipe": {}}, "no profile"),
        ({"profile": "../../config"}, "no name of a file"),
        ({"sensitivity": {"file": "../config.json", "bytes": 1, "sha256": ""}}, "no name of a file"),
        ({"sensitivity": {"file": "..", "bytes": 1, "sha256": ""}}, "no name of a file"),
        ({"artifact": of_files("/a/1.gguf", "/a/1.gguf")}, "listed twice"),
        ({"artifact": of_files("a/1.gguf", "a/../b/2.gguf")}, "outside"),
        ({"artifact": of_files("/a/1.gguf", "/etc/hosts")}, "not in the subpath"),
        ({"source": []}, "the report.source"),
        ({"arguments": None}, "the report.arguments"),
    ],
)
def test_what_is_no_report(changes: dict[str, Any], where: str):
    with pytest.raises(ValueError, match=where):
        Report.from_dict(plain() | changes)


def test_what_was_promised_and_what_was_not_judged():
    assert report().promises == {} and report(target_kld=0.5).promises == {"asked for": 0.5}
    assert report().not_judged and not report(agreement=AGREEMENT).not_judged
    assert not report(quality=None, coherence=None).not_judged
