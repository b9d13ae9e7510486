"""A damaged cache of kernels is named and compiled again; it is never believed, and never a traceback."""

import ast
import importlib.util
import logging
import os
from pathlib import Path

import pytest

from bitwright.formats import compiler

SOURCE = """
from bitwright.formats.compiler import jit

@jit
def double(x):
    return 2 * x
"""


def loaded(path: Path):
    """The kernel of a module that is imported anew."""
    spec = importlib.util.spec_from_file_location("kernel_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


def hits(kernel) -> int:
    return sum(kernel.stats.cache_hits.values())


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def data_files(folder: Path) -> list[Path]:
    return list((folder / "__pycache__").glob("*.nbc"))


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 500],
    ids=["a bit", "cut short", "empty", "other"],
)
def test_a_damaged_cache_is_named_and_rebuilt(tmp_path, caplog, suffix, damage):
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    assert loaded(path)(3) == 6
    again = loaded(path)
    assert again(4) == 8 and hits(again) == 1
    (kept,) = (tmp_path / "__pycache__").glob(f"*{suffix}")
    kept.write_bytes(damage(kept.read_bytes()))
    with caplog.at_level(logging.WARNING):
        rebuilt = loaded(path)
        assert rebuilt(5) == 10 and hits(rebuilt) == 0
    assert str(kept) in caplog.text and "compiled again" in caplog.text and "Traceback" not in caplog.text
    caplog.clear()
    again = loaded(path)
    assert again(6) == 12 and hits(again) == 1 and not caplog.text


def test_a_change_of_what_a_kernel_imports_compiles_all_kernels_again(tmp_path, monkeypatch):
    """numba itself asks the kernel's own file alone."""
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    assert loaded(path)(3) == 6
    sources = compiler.kernel_sources()
    monkeypatch.setattr(compiler, "kernel_sources", lambda: sources | {"kernels/float16.py": "another"})
    changed = loaded(path)
    assert changed(4) == 8 and hits(changed) == 0
    monkeypatch.undo()
    path.write_text(SOURCE.replace("2 * x", "3 * x"))
    assert loaded(path)(4) == 12


@pytest.mark.parametrize("version", ["bitwright.formats.compiler._GGUF_VERSION", "numba.__version__"])
def test_another_version_of_what_a_kernel_is_made_of_compiles_it_again(tmp_path, caplog, monkeypatch, version):
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    assert loaded(path)(3) == 6
    monkeypatch.setattr(version, "0.0")
    changed = loaded(path)
    assert changed(4) == 8 and hits(changed) == 0
    again = loaded(path)
    assert again(4) == 8 and hits(again) == 1 and not caplog.text
    assert len(data_files(tmp_path)) == 1


def test_the_sources_of_kernels_are_what_they_import_too(tmp_path):
    files = {
        "kernels/one.py": "from bitwright.formats.compiler import jit\nfrom bitwright.formats.helpers import ZERO\n",
        "kernels/two.py": "from bitwright.formats.compiler import (\njit)\nfrom bitwright.formats.blocks import fp4\n",
        "helpers.py": "from bitwright.formats.constants import ZERO\n",
        "constants.py": "ZERO = 0\n",
        "blocks/fp4.py": "",
        "compiler.py": "",
        "registry.py": "from bitwright.formats.kernels.one import kernel\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert set(compiler.kernel_sources(tmp_path)) == files.keys() - {"registry.py"}
    present = compiler.kernel_sources()
    assert {"kernels/float16.py", "kernels/scale_search.py", "parts.py", "compiler.py"} <= present.keys()
    assert not {"registry.py", "files/gguf.py"} & present.keys()


@pytest.mark.parametrize(
    "line",
    [
        "from bitwright.formats.blocks.fp4 import ZERO",
        "from bitwright.formats.blocks import fp4",
        "from bitwright.formats.blocks import (  # noqa: (none)\n    fp3,\n    fp4 as four,\n)",
        "from bitwright.formats.blocks import \\\n    fp4",
        "import bitwright.formats.other\nimport bitwright.formats.blocks.fp4",
        "import bitwright.formats.other, bitwright.formats.blocks.fp4 as four",
        "def late():\n    from bitwright.formats.blocks import fp4",
    ],
)
@pytest.mark.parametrize(
    "compiler_line", ["from bitwright.formats import compiler", "import bitwright.formats.compiler"]
)
def test_every_form_of_import_counts(tmp_path, line, compiler_line):
    (tmp_path / "blocks").mkdir()
    files = {"kernel.py": f"{compiler_line}\n{line}\n", "compiler.py": "", "blocks/fp4.py": "ZERO = 0\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "blocks" / "fp5.py").touch()
    assert compiler.kernel_sources(tmp_path).keys() == files.keys()


def test_no_import_of_the_package_escapes():
    """The syntax tree knows the imports of a module exactly; kernels have all of what it says, step by step."""
    root = Path(compiler.__file__).parent
    present = compiler.kernel_sources()
    missed = set()
    for path in root.rglob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level and node.module != "bitwright", f"{path}:{node.lineno}"
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        names = {name.removeprefix("bitwright.formats.").replace(".", "/") + ".py" for name in imported}
        own = path.relative_to(root).as_posix()
        if own in present or "compiler.py" in names:
            missed |= {own, *(name for name in names if (root / name).is_file())} - present.keys()
    assert missed == set()


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_cache_that_cannot_be_written_ends_no_job(tmp_path, caplog, monkeypatch, suffix):
    """And the older kernel that lies in it is not taken for the new one."""
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    assert loaded(path)(3) == 6
    path.write_text(SOURCE.replace("2 * x", "1000 * x"))
    replace = os.replace

    def full(source: str, target: str) -> None:
        if target.endswith(suffix):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert loaded(path)(3) == 3000
    assert "not kept: [Errno 28] No space left on device" in caplog.text
    third = loaded(path)
    assert third(3) == 3000 and hits(third) == 0
    fourth = loaded(path)
    assert fourth(3) == 3000 and hits(fourth) == 1
    assert len(data_files(tmp_path)) == 1


def test_an_older_data_file_is_not_believed(tmp_path, caplog):
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    assert loaded(path)(3) == 6
    (older,) = data_files(tmp_path)
    content = older.read_bytes()
    path.write_text(SOURCE.replace("2 * x", "1000 * x"))
    assert loaded(path)(3) == 3000
    (newer,) = data_files(tmp_path)
    newer.write_bytes(content)
    third = loaded(path)
    assert third(3) == 3000 and hits(third) == 0
    assert f"{newer} is damaged" in caplog.text


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_two_processes_that_write_at_once_mix_nothing_up(tmp_path, monkeypatch, suffix):
    """Each compiles another overload; the second writes all of its files before the first puts one in place."""
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        if target.endswith(suffix):
            patch.undo()
            assert loaded(path)(1.5) == 3.0
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert loaded(path)(3) == 6
    for _ in range(2):
        kernel = loaded(path)
        assert kernel(3) == 6 and kernel(1.5) == 3.0
    assert hits(kernel) == 2


def test_compiling_is_told_and_loading_is_not(tmp_path, caplog):
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)
    with caplog.at_level(logging.INFO, logger="bitwright.formats.compiler"):
        assert loaded(path)(3) == 6 and "compiling double" in caplog.text
        caplog.clear()
        assert loaded(path)(3) == 6 and not caplog.text
