"""The keywords that Python takes, as type checkers know them."""

import subprocess
import sys
from pathlib import Path

from scripts import typed_options

ROOT = Path(__file__).parents[2]
NEEDED = ("converter/__init__", "converter/typed_options", "calibration/choices", "formats/choices", "profiles/choices")


def test_they_are_the_fields_of_a_job():
    written = typed_options.TARGET.read_text()
    assert written == typed_options.source(), "run: python -m scripts.typed_options"


def test_mypy_knows_them(tmp_path):
    use = tmp_path / "use.py"
    use.write_text(
        "from bitwright.converter import convert, plan\n"
        'convert("m", profile="two-bit", target_size="1.2GiB", judge="fast", lm_eval=["a"], error_feedback=False)\n'
        'plan("m", output="m.gguf", samples=512, alpha="auto", cache=None)\n'
        'convert("m", sample=512)\n'
        'convert("m", samples="many")\n'
        'plan("m", judge="quick")\n'
    )
    files = [str(ROOT / "bitwright" / f"{name}.py") for name in NEEDED]
    options = ["--follow-imports=skip", "--config-file=", f"--cache-dir={tmp_path}", "--no-error-summary"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(use), *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    lines = [int(line.partition("use.py:")[2].split(":")[0]) for line in errors if "use.py:" in line]
    assert lines == [4, 5, 6] and len(errors) == 3, found.stdout + found.stderr
