"""File systems that have no locks."""

import errno
import fcntl
import tempfile

import pytest

from bitwright.converter.job.scratch import scratch_directory
from bitwright.converter.job.work_directory import WorkDirectory
from bitwright.formats.errors import ConvertError


@pytest.fixture
def no_locks(monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.mark.usefixtures("no_locks")
def test_a_work_directory_without_locks_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="No locks available") as refused, WorkDirectory(tmp_path / "work").locked():
        pass
    assert refused.value.where == str(tmp_path / "work") and "--work-dir" in refused.value.remedy


@pytest.mark.usefixtures("no_locks")
def test_temporary_files_without_locks_are_refused_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConvertError, match="No locks available") as refused, scratch_directory():
        pass
    assert "TMPDIR" in refused.value.remedy and not list(tmp_path.iterdir())
