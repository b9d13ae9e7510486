"""Runtimes in processes of their own: the children find this project wherever it is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bitwright.calibration.control import never, silent
from bitwright.converter.judge.generate import Generated, generate_by_llama_cpp
from tests import tiny_models
from tests.converter.artifact.f32_file import write_f32

ROOT = Path(__file__).parents[3]
ASK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bitwright.calibration.control import never, silent
from bitwright.converter.judge.generate import generate_by_llama_cpp
from bitwright.converter.judge.probe import Text, probe

artifact, prompt = Path(sys.argv[2]), json.loads(sys.argv[3])
generated = generate_by_llama_cpp(artifact, [prompt], 8, threads=1, progress=silent, should_stop=never)
answer = probe("llama.cpp", artifact, [Text("the quick fox")], [], 0, scratch=Path("x"), threads=1, should_stop=never)
print(json.dumps([generated.to_dict(), answer.runtime]))
"""


def test_children_are_those_of_the_installed_copy(tiny, tmp_path):
    """As a wheel installs it: one package of files, no links. It names the runtime otherwise, to be told from this one;
    and what lies in the current directory is not imported."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "bitwright", site / "bitwright", ignore=shutil.ignore_patterns("__pycache__"))
    names = site / "bitwright/converter/judge/llama_cpp.py"
    names.write_text(names.read_text().replace('return f"llama.cpp (', 'return f"installed llama.cpp ('))
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('the current directory is on the path')")
    artifact, prompt = tmp_path / "m.gguf", tiny_models.tokens("llama-256")[:6]
    write_f32(tiny("llama-256"), artifact)
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK, str(site), str(artifact), json.dumps(prompt)],
        cwd=elsewhere,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    data, runtime = json.loads(done.stdout)
    generated = Generated.from_dict(data)
    here = generate_by_llama_cpp(artifact, [prompt], 8, threads=1, progress=silent, should_stop=never)
    assert generated.generations == here.generations
    assert generated.runtime == runtime == f"installed {here.runtime}"
