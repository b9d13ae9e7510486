"""Changing the disk: steps that can be seen and fail, trees that go as one, results that are sealed."""

import errno
from pathlib import Path

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import (
    file_sha256,
    make_directory,
    observed,
    open_file,
    remove_tree,
    rename,
    sync_file,
)
from bitwright.formats.files.seals import SEALS, is_sealed, is_sound, write_sealed
from bitwright.formats.files.whole import copy_file, is_temporary, whole_file


def steps_of(work) -> list[tuple[str, str]]:
    steps: list[tuple[str, str]] = []
    with observed(lambda step, path: steps.append((step, path.name))):
        work()
    return steps


def test_every_step_is_seen_before_it_is_taken(tmp_path):
    def work():
        with whole_file(tmp_path / "a", "file") as file:
            file.write(b"content")

    temporary = tmp_path / ".a.tmp"
    assert is_temporary(temporary) and not is_temporary(tmp_path / "a")
    assert steps_of(work) == [
        ("make", ".a.tmp"),
        ("write", ".a.tmp"),
        ("sync", ".a.tmp"),
        ("rename", "a"),
        ("sync", tmp_path.name),
    ]
    assert (tmp_path / "a").read_bytes() == b"content" and not temporary.exists()


@pytest.mark.parametrize("failing", ["make", "write", "sync", "rename"])
def test_a_step_that_fails_leaves_the_old_file(failing, tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def fail(step, path):
        if step == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        observed(fail),
        pytest.raises(ConvertError, match="No space left on device"),
        whole_file(tmp_path / "a", "file") as file,
    ):
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_written_anywhere_and_made_where_there_is_none(tmp_path):
    for content in (b"abcdef", b"abXYef"):
        with open_file(tmp_path / "a") as file:
            file.seek(2 if content == b"abXYef" else 0)
            file.write(b"XY" if content == b"abXYef" else content)
            sync_file(file)
        assert (tmp_path / "a").read_bytes() == content
    with open_file(tmp_path / "a", fresh=True) as file:
        assert file.read() == b""


def test_a_tree_goes_as_one_and_links_are_not_followed(tmp_path):
    foreign = tmp_path / "foreign"
    make_directory(foreign)
    (foreign / "file").write_bytes(b"")
    tree = tmp_path / "tree"
    make_directory(tree / "deep" / "deeper")
    (tree / "deep" / "file").write_bytes(b"")
    (tree / "link").symlink_to(foreign, target_is_directory=True)

    class Killed(BaseException):
        pass

    def kill(step, path):
        if step == "remove":
            raise Killed

    with observed(kill), pytest.raises(Killed):
        remove_tree(tree)
    assert not tree.exists() and (tmp_path / ".tree.removed").is_dir()
    remove_tree(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"] and (foreign / "file").exists()
    remove_tree(tree)  # nothing is there


def test_failures_of_directories_are_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConvertError, match="making the directory failed"):
        make_directory(tmp_path / "file" / "below")
    with pytest.raises(ConvertError, match="writing failed"):
        rename(tmp_path / "absent", tmp_path / "other")


def test_a_copy_is_whole(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("damage", [changed, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_seal_tells_what_has_changed(damage, tmp_path):
    path = tmp_path / "result.json"
    assert not is_sound(path) and not is_sealed(path)
    for content in (b"{}", b"[1]"):
        write_sealed(path, "result", content)
        assert path.read_bytes() == content and is_sound(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", SEALS]
    damage(path)
    assert not is_sound(path) and is_sealed(path)
    write_sealed(path, "result", b"{}")
    damage(tmp_path / SEALS)
    assert not is_sound(path)
