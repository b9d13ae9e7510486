"""What is installed: one package, whole, which runs without this checkout."""

import os
import shlex
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from bitwright.converter.job.cache import DIRECTORY_VARIABLE

ROOT = Path(__file__).parent.parent
PACKAGES = ("converter", "formats", "calibration", "profiles")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
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
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A directory with what the wheel puts into site-packages."""
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel in it. What the wheel depends on is that of the tests, where a path leads,
    and so are the compiled kernels: what belongs to which source is in them, and compiling all takes a minute."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    for compiled in (*ROOT.glob("formats/**/*.hashed.nbi"), *ROOT.glob("formats/**/*.hashed.*.nbc")):
        place = site_packages / "bitwright" / compiled.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(compiled, place)
    return environment / "bin"


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


def run(programs: Path, command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """A command of the environment, in another directory than the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment[DIRECTORY_VARIABLE] = str(directory / "cache")
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_commands_of_the_readme_run_from_the_wheel(programs, tmp_path, tiny):
    """Data files, presets, templates and child processes are all those that were installed: no other path has them."""
    where = run(programs, ["python", "-P", "-c", "import bitwright.converter.cli as c; print(c.__file__)"], tmp_path)
    assert str(programs.parent) in where.stdout
    shutil.copytree(tiny("llama"), tmp_path / "org" / "model")
    block = (ROOT / "README.md").read_text().split("```")[1].strip().splitlines()
    install, *commands = [shlex.split(line, comments=True) for line in block]
    assert install == ["pip", "install", "bitwright"] and len(commands) == 3
    for command in commands:
        # To be quick; the second and the third are unjudged, as that is the same code as the first one's.
        quick = ["--samples", "128", "--sequence-length", "16", "--no-error-feedback"]
        quick += ["--judge", "off"] if command != commands[0] else []
        done = run(programs, [*command, *quick], tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Verdict: " in done.stdout
    assert len([*tmp_path.glob("*.gguf")]) == 2 and len([*tmp_path.glob("*.bitwright*/report.html")]) == 3
    assert (tmp_path / "Model-113K-quantized.w8a8" / "config.json").is_file()


def test_both_names_of_the_command_are_installed(programs, tmp_path):
    versions = [run(programs, [name, "--version"], tmp_path).stdout for name in ("bitwright", "convert")]
    assert all(f"version {version('bitwright')}" in said for said in versions)


def test_make_convert_names_no_profile_unless_it_is_told():
    """A target chooses its own."""
    for given, named in ((["OPTIONS=--target-size 80MiB"], False), (["PROFILE=two-bit"], True)):
        command = ["make", "--dry-run", "--old-file", ".venv/.ready", "convert", "MODEL=org/model", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (line,) = (line for line in done.stdout.splitlines() if "/bitwright " in line)
        assert ("--profile" in line) == named and "'org/model'" in line
        assert named or "--target-size 80MiB" in line
