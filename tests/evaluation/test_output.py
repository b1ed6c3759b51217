"""Results are written completely, and never over the files of somebody else."""
from __future__ import annotations

import json
import os

import pytest

from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.output import write_results


def results(number):
    return {"a.json": json.dumps({"made_by": "confkd test", "number": number}),
            "a.txt": lambda file: file.write_text(str(number))}


def number_in(folder):
    return json.loads((folder / "a.json").read_text())["number"]


def test_earlier_results_of_the_same_command_are_replaced(tmp_path):
    for number in (1, 2):
        files = write_results(tmp_path / "new" / "out", "confkd test", results(number))
    assert [file.name for file in files] == ["a.json", "a.txt"] == sorted(os.listdir(tmp_path / "new" / "out"))
    assert files[1].read_text() == "2" and number_in(tmp_path / "new" / "out") == 2


@pytest.mark.parametrize("name, text", [
    ("a.txt", "precious"), ("a.json", "{}"), ("a.json", "[]"), ("a.json", "no JSON"),
    ("a.json", '{"made_by": "confkd other"}')])
def test_files_of_somebody_else_stay(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="a.json or a.txt that confkd test has not written; give another --output"):
        write_results(tmp_path, "confkd test", results(1))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == text


def test_an_interruption_leaves_the_former_files(tmp_path, monkeypatch):
    write_results(tmp_path, "confkd test", results(1))

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, "confkd test", results(2))
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"] and number_in(tmp_path) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out: cannot be written to .*--output"):
        write_results(tmp_path / "file" / "out", "confkd test", results(1))
