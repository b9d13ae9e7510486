"""What of this tool and of its inputs decides an artifact's bytes, as hashes."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitwright.converter.job.job import Job
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.files.disk import file_sha256

PACKAGES = ("formats", "calibration", "profiles", "converter")


def tool_identity() -> str:
    """The release and a hash of its code: a version of the code must not finish what another version has begun."""
    return code_identity(Path(__file__).parents[2])


@cache
def code_identity(root: Path) -> str:
    """root: the folder of the four packages. Every .py and .toml file in them counts, as nearly all decide bytes."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".toml")):
            name, content = str(path.relative_to(root)).encode(), path.read_bytes()
            digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return f"{version('bitwright')}+{digest.hexdigest()[:12]}"


def job_fingerprint(job: Job, checkpoint: Checkpoint, command: str = "convert", **decided: object) -> dict[str, Any]:
    """What decides the bytes of a job's result: finished work is reused only where all of it is the same.

    command: the one that does the job. decided: what was made of the options since, in their places or beside them.
    """
    return {
        "tool": tool_identity(),
        "model": checkpoint.model_id,
        "revision": checkpoint.revision,
        "files": [list(entry) for entry in checkpoint.files()],
        **job.identity(command),
        "calibration_file": _calibration_file_sha256(job),
        **decided,
    }


def _calibration_file_sha256(job: Job) -> str | None:
    """Of the text file that the job calibrates on, None where it names a corpus."""
    path = Path(job.calibration).expanduser() if job.calibration else None
    return file_sha256(path) if path is not None and path.is_file() else None
