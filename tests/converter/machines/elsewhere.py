"""Commands as a machine with another processor runs them."""

import os
import subprocess
import sys


def run_elsewhere(capability: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """capability: of the processor, as torch calls it; "default" has no vectors wider than 16 bytes."""
    command = [sys.executable, "-m", "bitwright.converter", *map(str, arguments)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
