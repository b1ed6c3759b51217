"""Files and folders are written completely or not at all."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nnunet_confkd.files import new_folder, write_json, write_text, written_whole


def contents(folder: Path) -> dict[str, str | None]:
    """{relative path: text, None for a folder}, hidden ones too."""
    return {file.relative_to(folder).as_posix(): None if file.is_dir() else file.read_text()
            for file in sorted(folder.rglob("*"))}


# ---- files ----------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    for content in ("first", "second"):
        with written_whole(file) as aside:
            aside.write_text(content)
            assert not file.exists() or file.read_text() == "first"
    assert file.read_text() == "second"
    with pytest.raises(KeyboardInterrupt):
        with written_whole(file) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt
    assert contents(tmp_path) == {"file": "second"}


def test_processes_of_one_number_do_not_write_into_each_others_files(tmp_path):
    """Such as processes of two containers that share a folder."""
    with written_whole(tmp_path / "file") as first, written_whole(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second, which is longer")
    assert contents(tmp_path) == {"file": "first"}, "the one that ends last counts, and is whole"


@pytest.mark.parametrize("sole_writer", (True, False))
def test_what_killed_processes_have_left_of_a_file_is_removed_by_its_sole_writer(tmp_path, sole_writer):
    """Checkpoints are large, and a training may be killed often."""
    left, other = tmp_path / ".123.checkpoint.pth", tmp_path / ".123.another_checkpoint.pth"
    for file in (left, other):
        file.touch()
    with written_whole(tmp_path / "checkpoint.pth", sole_writer) as aside:
        aside.touch()
    assert left.exists() != sole_writer and other.exists()


def test_the_path_to_write_to_has_the_ending_of_the_file(tmp_path):
    """Many writers choose the format by it."""
    with written_whole(tmp_path / "image.nii.gz") as aside:
        aside.write_text("image")
        assert aside.parent == tmp_path and aside.name.endswith(".image.nii.gz")


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses what this test guards against by itself")
def test_what_is_brought_to_the_disk_is_open_for_writing(tmp_path, monkeypatch):
    """os.fsync of a file that is open for reading is an error on Windows."""
    import fcntl
    import stat
    modes, fsync = [], os.fsync

    def watched(file: int) -> None:
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    write_text(tmp_path / "file", "content")
    assert modes == [os.O_RDWR] and (tmp_path / "file").read_text() == "content"


def test_texts_are_utf_8_with_unchanged_line_ends(tmp_path):
    write_text(tmp_path / "file", "ä\nb\r\n")
    assert (tmp_path / "file").read_bytes() == "ä\nb\r\n".encode()


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "file", {"a": [1, 2]})
    write_json(tmp_path / "line", {"a": [1, 2]}, indent=None)
    assert json.loads((tmp_path / "file").read_text()) == {"a": [1, 2]}
    assert (tmp_path / "line").read_text() == '{"a": [1, 2]}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", float("nan"))
    assert json.loads((tmp_path / "file").read_text()) == {"a": [1, 2]}


# ---- folders --------------------------------------------------------------------------------------------------------

def test_a_new_folder_is_there_only_when_it_is_complete(tmp_path):
    target = tmp_path / "above" / "folder"
    with new_folder(target) as new:
        (new / "file").write_text("content")
        assert new.parent == target.parent and new.name.startswith(".") and not target.exists()
    assert contents(tmp_path) == {"above": None, "above/folder": None, "above/folder/file": "content"}


@pytest.mark.parametrize("replace", [False, True])
def test_after_an_error_nothing_is_left_of_a_new_folder(tmp_path, replace):
    before = {}
    if replace:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old").write_text("old")
        before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "folder", replace) as new:
            (new / "file").write_text("half")
            raise KeyboardInterrupt
    assert contents(tmp_path) == before


def test_an_existing_folder_is_replaced_only_if_this_is_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="folder: exists already"):
        with new_folder(tmp_path / "folder"):
            pytest.fail("it began to write")
    assert contents(tmp_path) == {"folder": None, "folder/old": "old"}
    with new_folder(tmp_path / "folder", replace=True) as new:
        (new / "file").write_text("new")
        assert (tmp_path / "folder" / "old").read_text() == "old"
    assert contents(tmp_path) == {"folder": None, "folder/file": "new"}


def test_the_working_folder_may_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(".", replace=True) as new:
        (new / "a").write_text("a")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["a"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def fail(self, target, rename=Path.rename):
        if ".part" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        with new_folder(tmp_path / "folder", replace=True) as new:
            (new / "file").write_text("new")
    assert contents(tmp_path) == {"folder": None, "folder/old": "old"}


def test_what_a_killed_process_of_the_same_number_has_left_is_removed(tmp_path):
    with new_folder(tmp_path / "folder") as new:
        name = new.name
    (tmp_path / "folder").rmdir()
    (tmp_path / name).mkdir()
    (tmp_path / name / "left").write_text("half")
    with new_folder(tmp_path / "folder") as new:
        assert list(new.iterdir()) == []
    assert contents(tmp_path) == {"folder": None}


@pytest.mark.skipif(os.name == "nt", reason="links need permissions on Windows")
def test_a_folder_that_is_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large disk")
    with new_folder(tmp_path / "link", replace=True) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large disk" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large disk", "link"]
