"""A damaged cache of kernels is named and compiled again; it is never believed, and never a traceback."""

import importlib.util
import logging
from pathlib import Path

import pytest

SOURCE = """
from formats.compiler import njit

@njit(cache=True)
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


def test_a_cache_that_cannot_be_written_ends_no_job(tmp_path, caplog, monkeypatch):
    path = tmp_path / "kernel_under_test.py"
    path.write_text(SOURCE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("formats.compiler._CheckedFile._save_data", full)
    assert loaded(path)(3) == 6
    assert "not kept: [Errno 28] No space left on device" in caplog.text
