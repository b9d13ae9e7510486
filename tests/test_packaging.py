"""What is installed: one package, whole, which runs without this checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("converter", "formats", "calibration", "profiles")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory with what a wheel puts into site-packages."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(directory), str(source)], check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "installed")
    return directory / "installed"


def test_one_name_is_installed(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"bitwright"}


def test_every_file_is_installed(installed):
    of_checkout = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    of_wheel = {
        str(path.relative_to(installed / "bitwright"))
        for package in PACKAGES
        for path in (installed / "bitwright" / package).rglob("*")
        if path.is_file()
    }
    assert of_wheel == of_checkout


def test_it_runs_without_the_checkout(installed, tmp_path, tiny):
    """From another directory, with the installed files first: a conversion reads all data files that it needs, and its
    child processes find the package."""
    output = tmp_path / "m.gguf"
    arguments = ["--profile", "uniform-8bit", "--output", str(output), str(tiny("llama"))]
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import bitwright;"
        f" assert bitwright.__file__.startswith({str(installed)!r});"
        " from bitwright.converter.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert output.is_file() and (tmp_path / "m.bitwright" / "report.html").is_file()


def test_make_convert_names_no_profile_unless_it_is_told():
    """A target chooses its own."""
    for given, named in ((["OPTIONS=--target-size 80MiB"], False), (["PROFILE=two-bit"], True)):
        command = ["make", "--dry-run", "--old-file", ".venv/.ready", "convert", "MODEL=org/model", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (line,) = (line for line in done.stdout.splitlines() if "/bitwright " in line)
        assert ("--profile" in line) == named and "'org/model'" in line
        assert named or "--target-size 80MiB" in line
