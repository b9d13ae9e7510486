"""The records of a finished conversion, as the commands after it read them: nothing but what it wrote and sealed."""

from pathlib import Path
from typing import Any

from bitwright.converter.report.data import Report
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, read_json, read_whole
from bitwright.formats.files.seals import is_sealed, was_sealed

REPORT, PLAN, PAGE = "report.json", "plan.json", "report.html"
SPLIT_REPORT = "report-split.json"
"""The report of the files that `bitwright split` has made of an artifact, beside that of the artifact itself."""
_AGAIN = "run the same conversion again, it makes them anew"


def read_report(work_dir: Path, may_lack_seal: bool = False, name: str = REPORT) -> Report:
    """What was measured. may_lack_seal: for who changes it, where a kill may have cost the journal of seals its end.
    name: SPLIT_REPORT for the one of an artifact that was split.
    Raises ConvertError for a record that is missing, is no regular file, was changed since, or is no such."""
    path = work_dir / name
    try:
        return Report.from_dict(_read(path, may_lack_seal))
    except ValueError:
        raise _no_record(path) from None


def read_plan(work_dir: Path) -> dict[str, Any]:
    """Every tensor's format. Raises ConvertError as read_report does."""
    plan = _read(work_dir / PLAN)
    if not isinstance(plan.get("plan_sha256"), str):
        raise _no_record(work_dir / PLAN)
    return plan


def read_page(work_dir: Path) -> str | None:
    """The report for reading; None where there is none. Raises ConvertError for one that was changed."""
    path = work_dir / PAGE
    if not path.exists():
        return None
    _check_seal(path)
    return read_whole(path, LARGEST_METADATA_BYTES, _AGAIN).decode()


def _read(path: Path, may_lack_seal: bool = False) -> dict[str, Any]:
    if not path.exists():
        raise ConvertError(
            "the conversion's own record of this artifact is missing",
            str(path),
            "name its work directory with --work-dir, or convert again: the card states what was measured then",
        )
    if is_sealed(path) or not may_lack_seal:
        _check_seal(path)
    return read_json(path, remedy=_AGAIN)


def _no_record(path: Path) -> ConvertError:
    return ConvertError("this is no record of a conversion", str(path), _AGAIN)


def _check_seal(path: Path) -> None:
    if not was_sealed(path):
        raise ConvertError("the conversion's record is not what was written there", str(path), _AGAIN)
