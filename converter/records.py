"""The records of a finished conversion, as the commands after it read them: nothing but what it wrote and sealed."""

from pathlib import Path
from typing import Any, Literal

from converter.verdict import COHERENT, FAILED, NOTICEABLE, SEVERE
from formats.errors import ConvertError
from formats.regular_file import LARGEST_METADATA_BYTES, read_json, read_whole
from formats.seals import is_sealed, was_sealed
from formats.typed import is_a

REPORT, PLAN, PAGE = "report.json", "plan.json", "report.html"
_AGAIN = "run the same conversion again, it makes them anew"
_MANIFEST = (None, {"file": str, "path": str, "sha256": str})
# What is read of a report, but for what only the card shows. Of a tuple one holds, of a list all do.
_REPORT = {
    "model": str,
    "revision": str | None,
    "profile": str,
    "plan_sha256": str,
    "recipe": {"profile": str, "profile_toml": str},
    "arguments": list[str],
    "calibration": _MANIFEST,
    "sensitivity": _MANIFEST,
    "source": {"card": dict[str, object]},
    "artifact": {"bytes": int, "files": [{"path": str, "bytes": int, "sha256": str}]},
    "verdict": Literal[COHERENT, NOTICEABLE, SEVERE, FAILED] | None,
}


def read_report(work_dir: Path, may_lack_seal: bool = False) -> dict[str, Any]:
    """What was measured. may_lack_seal: for who changes it, where a kill may have cost the journal of seals its end.
    Raises ConvertError as _read does."""
    return _read(work_dir / REPORT, _REPORT, may_lack_seal)


def read_plan(work_dir: Path) -> dict[str, Any]:
    """Every tensor's format. Raises ConvertError as _read does."""
    return _read(work_dir / PLAN, {"plan_sha256": str})


def read_page(work_dir: Path) -> str | None:
    """The report for reading; None where there is none. Raises ConvertError for one that was changed."""
    path = work_dir / PAGE
    if not path.exists():
        return None
    _check_seal(path)
    return read_whole(path, LARGEST_METADATA_BYTES, _AGAIN).decode()


def _read(path: Path, declared: Any, may_lack_seal: bool = False) -> dict[str, Any]:
    """Raises ConvertError for a record that is missing, is no regular file, was changed since, or is no such."""
    if not path.exists():
        raise ConvertError(
            "the conversion's own record of this artifact is missing",
            str(path),
            "name its work directory with --work-dir, or convert again: the card states what was measured then",
        )
    if is_sealed(path) or not may_lack_seal:
        _check_seal(path)
    record = read_json(path, remedy=_AGAIN)
    if not _fits(record, declared):
        raise ConvertError("this is no record of a conversion", str(path), _AGAIN)
    return record


def _check_seal(path: Path) -> None:
    if not was_sealed(path):
        raise ConvertError("the conversion's record is not what was written there", str(path), _AGAIN)


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, tuple):
        return any(_fits(value, option) for option in declared)
    if isinstance(declared, list):
        return isinstance(value, list) and all(_fits(item, declared[0]) for item in value)
    if isinstance(declared, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], of) for key, of in declared.items())
    return value is None if declared is None else is_a(value, declared)
