"""The command line of a machine that fails once while it encodes the second of two parts: MARKER ARGUMENTS."""

import os
import signal
import sys
from pathlib import Path

from bitwright.converter.artifact.writer import JOURNAL
from bitwright.converter.cli import main
from bitwright.formats.files.disk import Step, observed

AFTER_TENSORS = 4


def _kill_amid(step: Step, path: Path, counted: list[Path]) -> None:
    if step == "sync" and path.name == JOURNAL:
        counted.append(path)
        if len(counted) == AFTER_TENSORS:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    marker, *arguments = sys.argv[1:]
    if arguments[0] == "encode" and "2/2" in arguments and not Path(marker).exists():
        Path(marker).touch()
        counted: list[Path] = []
        with observed(lambda step, path: _kill_amid(step, path, counted)):
            main(arguments)
    if arguments[0] == "encode" and "2/2" in arguments:
        journals = Path(arguments[arguments.index("--output") + 1]).parent.glob(f"*-work/{JOURNAL}")
        lines = [line for journal in journals for line in journal.read_text().splitlines()]
        Path(marker).write_text(f"{len(lines)}")
    main(arguments)
