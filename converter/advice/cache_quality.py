"""What keys and values in fewer bits cost an artifact: measured by `bitwright evaluate --kv`, kept beside its report,
and read by `bitwright advise`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.converter.artifact.naming import whole_name
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import CACHE_QUALITY, default_work_dir
from bitwright.converter.report.data import Report
from bitwright.converter.report.records import REPORT, SPLIT_REPORT, read_report
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import file_sha256
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.seals import is_sound, write_sealed


def keep_cache_quality(artifact: Path, evaluation: Mapping[str, Any], progress: Progress) -> None:
    """Keep an evaluation with rounded keys and values in the artifact's work directory, beside those in other formats.

    artifact: a GGUF, a shard of one, or a directory. evaluation: as quality_with_cache gives it. Says where it is;
    or why it is not kept, of an artifact without a report, or that is not what its report says: nobody could tell later
    what was measured."""
    whole = artifact if artifact.is_dir() else artifact.with_name(whole_name(artifact.name))
    work_dir = default_work_dir(whole.absolute())
    name = SPLIT_REPORT if whole.name != artifact.name and (work_dir / SPLIT_REPORT).exists() else REPORT
    try:
        report = read_report(work_dir, name=name)
        hashes = _hashes(report)
        root = artifact if artifact.is_dir() else artifact.parent
        changed = [file for file, sha256 in hashes.items() if file_sha256(root / file) != sha256]
    except (ConvertError, OSError, ValueError) as error:
        why = error.what if isinstance(error, ConvertError) else str(error)
        progress.say(f"not kept for bitwright advise: {why}")
        return
    if changed:
        progress.say(f"not kept for bitwright advise: {changed[0]} is not what its report says")
        return
    path = work_dir / CACHE_QUALITY
    entry = {"model": report.model, "plan_sha256": report.plan_sha256, "files": hashes, "quality": dict(evaluation)}
    write_sealed(path, "quality", json.dumps({**_kept(path), str(evaluation["kv"]): entry}, indent=1).encode())
    progress.say(f"kept for bitwright advise: {path}")


def kept_cache_quality(report_path: Path, report: Mapping[str, Any]) -> dict[str, float]:
    """Format of keys and values -> mean KL divergence from the source, in nats, of the artifact that this report is of,
    run with such a cache. Entries of another artifact that lay there before do not count."""
    found = {}
    try:
        hashes = _hashes(Report.from_dict(dict(report)))
    except ValueError:
        return {}
    for kv, entry in _kept(report_path.with_name(CACHE_QUALITY)).items():
        if isinstance(entry, dict) and entry.get("files") == hashes and isinstance(entry.get("quality"), dict):
            kld = entry["quality"].get("mean_kld")
            if isinstance(kld, float):
                found[kv] = kld
    return found


def _hashes(report: Report) -> dict[str, str]:
    return {name: file.sha256 for name, file in report.artifact.by_name.items()}


def _kept(path: Path) -> dict[str, Any]:
    """What was kept there, {} where nothing was, or it has changed since."""
    try:
        content = read_json(path, remedy="") if is_sound(path) else {}
    except (ConvertError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
