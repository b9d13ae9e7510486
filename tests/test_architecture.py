"""The order of the rooms, read from the imports in the source: docs/architecture.md is the picture of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("converter", "profiles", "calibration", "formats")
LARGEST_ROOM, LARGEST_FOLDER = 500, 12  # lines of a module, modules of a folder

# From the top down: what stands higher imports what stands lower, and nothing the other way. Those of one line are
# beside each other, and know nothing of each other.
FLOORS = {
    "": [{"converter"}, {"profiles", "calibration"}, {"formats"}],
    "converter": [
        {"__main__"},
        {"cli"},
        {"commands"},
        {"several", "machines"},
        {"imatrix", "outlook"},
        {"advice"},
        {"pipeline", "publishing", "split", "lora_gguf"},
        {"preparation"},
        {"forecast", "finished"},
        {"report", "judge"},
        {"gguf", "directory"},
        {"smoothing", "preflight", "sequence"},
        {"measure"},
        {"artifact"},
        {"model", "job"},
        {"tokenizer"},
        {"source"},
        {"architectures"},
        {"boundary", "record", "typed_options"},
    ],
    "profiles": [
        {"planning", "advice"},
        {"reading"},
        {"choices", "evidence", "mixes", "sizes", "vocabulary"},
        {"layout"},
    ],
    "calibration": [
        {"super_weights"},
        {"evaluation"},
        {"sensitivity"},
        {"passes"},
        {"statistics", "stream"},
        {"text", "fastest_dtype"},
        {"child", "choices", "control", "places"},
    ],
    "formats": [],
}


def _modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """The modules of ours that this one imports, at its top or in its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            of_ours = full.removeprefix("bitwright.")
            assert of_ours == full or of_ours.split(".")[0] in PACKAGES, f"{name} imports {full}"
            assert full.split(".")[0] not in PACKAGES, (
                f"{name} imports {full}, which is bitwright.{full} when installed"
            )
            if of_ours != full:
                found.add(of_ours if of_ours in MODULES else of_ours.rpartition(".")[0])
    return found - {name}


IMPORTS = {name: _imports(name) for name in MODULES}


def _room(name: str, package: str) -> str:
    """What of the package a module belongs to: the part of its name that follows the package's."""
    return name.removeprefix(package).strip(".").split(".")[0]


@pytest.mark.parametrize("package", [package for package, floors in FLOORS.items() if floors])
def test_imports_go_down(package):
    floors = FLOORS[package]
    level = {room: height for height, rooms in enumerate(floors) for room in rooms}
    wrong = []
    for name, imported in IMPORTS.items():
        if package and name.split(".")[0] != package:
            continue
        here = _room(name, package)
        for other in sorted(imported):
            if package and other.split(".")[0] != package:
                continue
            there = _room(other, package)
            if here == there or not there:
                continue
            if here and level[here] >= level[there]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_nothing_goes_round():
    """No module imports itself through others, whether at its top or inside a function."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_can_be_read_in_one_sitting(package):
    rooms = [path for name, path in MODULES.items() if name.split(".")[0] == package]
    long = {str(path): n for path in rooms if (n := len(path.read_text().splitlines())) > LARGEST_ROOM}
    assert long == {}
    folders = {path.parent for path in rooms}
    full = {folder.name: n for folder in folders if (n := len(list(_rooms(folder)))) > LARGEST_FOLDER}
    assert full == {}


def _rooms(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".py" and path.name != "__init__.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_takes_the_place_of_a_function(package):
    """A module that is imported becomes an attribute of its package, whatever had that name there."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not functions & {path.stem for path in (ROOT / package).iterdir()}
