"""nnU-Net's folders: a new data set is written completely or not at all, whatever ends the process that writes it."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nnunet_confkd.data.folders import WRITTEN_FILES, find_dataset, folder_name, new_dataset, require_free_id
from nnunet_confkd.errors import InputError

EMPTY = {"raw": None, "preprocessed": None, "results": None}
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor these permissions")


def _tree(folder: Path) -> dict[str, str | None]:
    """{relative path: content, None for a folder}, hidden ones too."""
    return {file.relative_to(folder).as_posix(): None if file.is_dir() else file.read_text()
            for file in sorted(folder.rglob("*"))}


def _write(dataset_id: int = 7, name: str = "Test") -> None:
    """Write a data set of one file in each folder."""
    with new_dataset(dataset_id, name) as (raw, preprocessed):
        (raw / "file").write_text("raw")
        (preprocessed / "file").write_text("preprocessed")


def _refused(nnunet: Path, dataset_id: int = 7, name: str = "Test") -> str:
    """Write a data set, see that it is refused and that nothing has changed; return the error's text."""
    before = _tree(nnunet)
    with pytest.raises(InputError) as error:
        _write(dataset_id, name)
    assert _tree(nnunet) == before
    return str(error.value)


# ---- what is written ------------------------------------------------------------------------------------------------

def test_a_data_set_is_there_only_when_it_is_complete(nnunet_folders):
    with new_dataset(7, "Test") as (raw, preprocessed):
        (raw / "file").write_text("raw")
        (preprocessed / "file").write_text("preprocessed")
        assert all(
            name.startswith(".") for folder in ("raw", "preprocessed") for name in os.listdir(nnunet_folders / folder)
        )
    assert _tree(nnunet_folders) == EMPTY | {
        "raw/Dataset007_Test": None, "raw/Dataset007_Test/file": "raw",
        "preprocessed/Dataset007_Test": None, "preprocessed/Dataset007_Test/file": "preprocessed"}


def test_an_empty_preprocessed_folder_is_not_kept(nnunet_folders):
    with new_dataset(7, "Test") as (raw, _):
        (raw / "file").write_text("raw")
    assert _tree(nnunet_folders) == EMPTY | {"raw/Dataset007_Test": None, "raw/Dataset007_Test/file": "raw"}


def test_a_data_set_may_be_written_in_a_thread(nnunet_folders):
    thread = threading.Thread(target=_write)
    thread.start()
    thread.join()
    assert os.listdir(nnunet_folders / "raw") == ["Dataset007_Test"]


def test_the_folder_of_results_need_not_be_known(nnunet_folders, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    _write()
    assert os.listdir(nnunet_folders / "raw") == ["Dataset007_Test"]


def test_folders_that_do_not_exist_yet_are_made(nnunet_folders, monkeypatch):
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(nnunet_folders / "new" / name))
    _write()
    for name in ("raw", "preprocessed"):
        assert (nnunet_folders / "new" / name / "Dataset007_Test" / "file").read_text() == name


def test_after_an_error_nothing_is_left(nnunet_folders):
    with pytest.raises(KeyboardInterrupt):
        with new_dataset(7, "Test") as (raw, preprocessed):
            (raw / "file").write_text("half")
            (preprocessed / "file").write_text("half")
            raise KeyboardInterrupt
    assert _tree(nnunet_folders) == EMPTY


def test_the_preprocessed_folder_does_not_stay_if_the_raw_one_cannot_be_moved(nnunet_folders, monkeypatch):
    def fail(self, target, rename=Path.rename):
        if Path(target) == nnunet_folders / "raw" / "Dataset007_Test":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert re.search("Dataset007_Test: cannot be written, nothing was kept; .*Input/output "
                     "error", _refused(nnunet_folders))


def test_sigterm_does_afterwards_what_it_did_before(nnunet_folders):
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    with new_dataset(1, "A"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset_id", [0, -1, 1000])
def test_ids_out_of_range_are_refused(nnunet_folders, dataset_id):
    assert f"from 1 to 999, not {dataset_id}" in _refused(nnunet_folders, dataset_id)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b", "_a", "ä", "a\n"])
def test_bad_names_of_data_sets_are_refused(nnunet_folders, name):
    assert f"letters, digits, _ and - only, not {name!r}" in _refused(nnunet_folders, name=name)
    assert folder_name(7, "A_b-2") == "Dataset007_A_b-2"


@pytest.mark.parametrize("where", ["raw", "preprocessed", "results"])
def test_a_taken_id_is_refused_under_any_name(nnunet_folders, where):
    taken = nnunet_folders / where / "Dataset007_Other"
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert f"the id 7 is taken by {taken}; choose another --id" in _refused(nnunet_folders)


@pytest.mark.parametrize("where", ["raw", "preprocessed"])
def test_an_id_that_is_taken_while_it_is_written_stays_with_the_other(nnunet_folders, where):
    with pytest.raises(InputError, match="the id 7 is taken by .*Dataset007_Test"):
        with new_dataset(7, "Test") as (raw, _):
            (raw / "file").write_text("ours")
            (nnunet_folders / where / "Dataset007_Test").mkdir()
            (nnunet_folders / where / "Dataset007_Test" / "file").write_text("mine")
    assert _tree(nnunet_folders) == EMPTY | {f"{where}/Dataset007_Test": None, f"{where}/Dataset007_Test/file": "mine"}


def test_an_id_that_another_process_is_writing_is_refused_and_another_id_is_not(nnunet_folders):
    with new_dataset(7, "Other"):
        assert re.search("nnunet/raw/.Dataset007.lock: another process is writing a data set of this "
                         "id", _refused(nnunet_folders))
        _write(8)
    assert sorted(os.listdir(nnunet_folders / "raw")) == ["Dataset007_Other", "Dataset008_Test"]


def test_a_lock_file_that_nobody_holds_is_in_nobodys_way(nnunet_folders):
    (nnunet_folders / "raw" / ".Dataset007.lock").touch()
    _write()
    assert os.listdir(nnunet_folders / "raw") == ["Dataset007_Test"]


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(nnunet_folders, monkeypatch, variable, value):
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    text = _refused(nnunet_folders)
    assert f"the environment variable {variable} is not set" in text and f"export {variable}=" in text


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_folder_below_a_file_is_refused(nnunet_folders, monkeypatch, variable, below):
    file = nnunet_folders / "file"
    file.write_text("")
    monkeypatch.setenv(variable, str(file / below) if below else str(file))
    text = _refused(nnunet_folders)
    assert "cannot be written, nothing was kept; check the permissions and the space" in text and f"'{file}" in text


@posix
@pytest.mark.parametrize("variable", ["raw", "preprocessed"])
def test_a_folder_without_the_right_to_write_is_refused(monkeypatch, variable):
    """In a place that another user can reach, which the folders of the other tests are not."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name in ("raw", "preprocessed"):
            (place / name).mkdir()
            (place / name).chmod(0o555 if name == variable else 0o777)
            monkeypatch.setenv(f"nnUNet_{name}", str(place / name))
        monkeypatch.delenv("nnUNet_results", raising=False)
        place.chmod(0o755)
        root = os.geteuid() == 0
        if root:  # who may write everywhere
            os.seteuid(65534)
        try:
            text = _refused(place)
        finally:
            if root:
                os.seteuid(0)
        assert "cannot be written, nothing was kept; check the permissions" in text
        assert f"Permission denied: '{place}/{variable}/.Dataset007" in text


def test_data_sets_are_found_by_id_and_by_name(nnunet_folders):
    for name in ("Dataset027_ACDC", "Dataset028_A", "Dataset028_B"):
        (nnunet_folders / "raw" / name).mkdir()
    assert {find_dataset(wanted) for wanted in (27, "27", "027", "Dataset027_ACDC")} == {"Dataset027_ACDC"}
    for wanted, text in ((28, "several data sets of the id 28: Dataset028_A, Dataset028_B"),
                         ("Dataset001_X", "no data set Dataset001_X; set nnUNet_raw"), (5, "no data set 5; set "
                                                                                           "nnUNet_raw")):
        with pytest.raises(InputError, match=f"{nnunet_folders / 'raw'}: has {text}"):
            find_dataset(wanted)


# ---- interruption ---------------------------------------------------------------------------------------------------

RUN = """
import os, signal, sys, time
from pathlib import Path
from nnunet_confkd.data.folders import new_dataset
from nnunet_confkd.processes import parallel

workers = Path(sys.argv[1])

def work(file):
    file.write_text("label")
    (workers / str(os.getpid())).touch()
    time.sleep(0.1)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    workers.mkdir(exist_ok=True)
    with new_dataset(7, "Run") as (raw, preprocessed):
        parallel(work, [(folder / str(i),) for i in range(1000) for folder in (raw, preprocessed)], 2, "writing")
"""


@pytest.fixture
def running(tmp_path, nnunet_folders):
    """A process that writes data set 7 with two workers, for minutes; both have begun."""
    if os.name == "nt":
        pytest.skip("what ends the process are POSIX's signals")
    (tmp_path / "run.py").write_text(RUN)
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "workers")],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _wait_for(lambda: len(_written(nnunet_folders)) > 2 and len(_workers(tmp_path)) == 2)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def _written(nnunet: Path) -> list[Path]:
    return list((nnunet / "raw").glob(".Dataset007_*/*"))


def _workers(tmp_path: Path) -> list[int]:
    return [int(name) for name in os.listdir(tmp_path / "workers")] if (tmp_path / "workers").is_dir() else []


def _wait_for_the_end_of_the_workers(tmp_path: Path) -> None:
    def runs(process: int) -> bool:
        """A zombie, which nobody waits for, does not."""
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    if not os.path.isdir("/proc/self"):
        pytest.skip("only Linux tells which processes are zombies")
    _wait_for(lambda: not any(runs(worker) for worker in _workers(tmp_path)))


@posix
def test_ctrl_c_leaves_nothing_and_until_then_another_process_is_refused(nnunet_folders, tmp_path, running):
    with pytest.raises(InputError, match="another process is writing a data set of this id"):
        _write()
    assert len(_written(nnunet_folders)) > 2 and running.poll() is None
    os.killpg(running.pid, signal.SIGINT)  # as the terminal does it: to all of them
    _, text = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT
    assert text.count("Traceback") == 1  # of the main process, and of no worker
    assert _tree(nnunet_folders) == EMPTY
    _wait_for_the_end_of_the_workers(tmp_path)


@posix
@pytest.mark.parametrize("to", ["kill", "killpg"], ids=("one", "group"))
def test_sigterm_leaves_nothing(nnunet_folders, tmp_path, running, to):
    getattr(os, to)(running.pid, signal.SIGTERM)
    _, text = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "Traceback" not in text
    assert _tree(nnunet_folders) == EMPTY
    _wait_for_the_end_of_the_workers(tmp_path)


@posix
def test_a_killed_process_leaves_no_data_set_and_the_next_one_removes_what_it_left(nnunet_folders, tmp_path, running):
    running.kill()
    running.wait()
    left = [
        nnunet_folders / folder / name
        for folder in ("raw", "preprocessed")
        for name in os.listdir(nnunet_folders / folder)
    ]
    assert left and all(path.name.startswith(".Dataset007") for path in left)
    _wait_for_the_end_of_the_workers(tmp_path)  # otherwise they would write on, and then wait forever
    with new_dataset(7, "Test") as (raw, _):
        (raw / "file").write_text("raw")
        assert _written(nnunet_folders) == [raw / "file"]  # what was left could fill the disk
    assert _tree(nnunet_folders) == EMPTY | {"raw/Dataset007_Test": None, "raw/Dataset007_Test/file": "raw"}


# ---- replacing -------------------------------------------------------------------------------------------------------

def _own(text, name="Test", folds=True, overwrite=False):
    """Write a data set as mix does, with a text to tell it by."""
    with new_dataset(7, name, overwrite) as (raw, preprocessed):
        (raw / "labelsTr").mkdir()
        (raw / "labelsTr" / "a.nii.gz").write_text(text)
        (raw / "dataset.json").write_text('{"written_by": "confkd mix"}')
        if folds:
            (preprocessed / "splits_final.json").write_text(text)


def _texts(nnunet_folders):
    """The texts of the raw and of the preprocessed folder; None where there is no such file. Nothing else is there."""
    files = ("raw/Dataset007_Test/labelsTr/a.nii.gz", "preprocessed/Dataset007_Test/splits_final.json")
    assert {path for path in _tree(nnunet_folders) if path.split("/")[1:]} <= {
        *files, "raw/Dataset007_Test", "raw/Dataset007_Test/labelsTr", "raw/Dataset007_Test/dataset.json",
        f"raw/Dataset007_Test/{WRITTEN_FILES}", "preprocessed/Dataset007_Test"}
    return tuple((nnunet_folders / file).read_text() if (nnunet_folders / file).is_file() else None for file in files)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_data_set_of_mix_is_replaced_with_its_preprocessed_data(nnunet_folders, before, after):
    _own("old", folds=before)
    if before:
        (nnunet_folders / "preprocessed" / "Dataset007_Test" / "nnUNetPlans.json").write_text("{}")
    _own("new", folds=after, overwrite=True)
    assert _texts(nnunet_folders) == ("new", "new" if after else None)


def test_to_overwrite_what_is_not_there_is_to_write_it(nnunet_folders):
    _own("new", overwrite=True)
    assert _texts(nnunet_folders) == ("new", "new")


def test_after_an_error_the_old_data_set_is_as_it_was(nnunet_folders):
    _own("old")
    with pytest.raises(KeyboardInterrupt), new_dataset(7, "Test", overwrite=True) as (raw, _):
        (raw / "half").write_text("")
        raise KeyboardInterrupt
    assert _texts(nnunet_folders) == ("old", "old")


@pytest.mark.parametrize("content", ['{"supervision": {}}', "{", "[]", None])
def test_a_data_set_of_another_program_is_not_replaced(nnunet_folders, content):
    folder = nnunet_folders / "raw" / "Dataset007_Test"
    folder.mkdir()
    if content is not None:
        (folder / "dataset.json").write_text(content)
    before = _tree(nnunet_folders)
    with pytest.raises(InputError, match="Dataset007_Test: was not written by confkd mix"):
        _own("new", overwrite=True)
    assert _tree(nnunet_folders) == before


def test_labels_that_were_changed_since_are_not_lost(nnunet_folders):
    _own("old")
    label = nnunet_folders / "raw" / "Dataset007_Test" / "labelsTr" / "a.nii.gz"
    later = label.stat().st_mtime + 60
    os.utime(label, (later, later))
    with pytest.raises(InputError, match=r"added or changed after the data set was written: labelsTr/a\.nii\.gz"):
        _own("new", overwrite=True)
    assert _texts(nnunet_folders) == ("old", "old")


@pytest.mark.parametrize("name", ["NOTES.txt", "labelsTs/b.nii.gz", "imagesTs/b_0000.nii.gz"])
def test_files_that_were_added_are_not_lost(nnunet_folders, name):
    _own("old")
    added = nnunet_folders / "raw" / "Dataset007_Test" / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("mine")
    os.utime(added, (0, 0))  # as cp -p does
    with pytest.raises(InputError, match=f"after the data set was written: {re.escape(name)}; copy what you need"):
        _own("new", overwrite=True)
    assert added.read_text() == "mine"


def test_a_copy_with_the_time_of_its_original_is_a_change(nnunet_folders):
    _own("old")
    raw = nnunet_folders / "raw" / "Dataset007_Test"
    for file in (raw / "labelsTr").iterdir():
        file.write_text("corrected")
        os.utime(file, (10 ** 9, 10 ** 9))
    with pytest.raises(InputError, match="added or changed after"):
        _own("new", overwrite=True)
    assert (raw / "labelsTr" / "a.nii.gz").read_text() == "corrected"


def test_an_edited_description_does_not_hide_other_changes(nnunet_folders):
    _own("old")
    raw = nnunet_folders / "raw" / "Dataset007_Test"
    (raw / "labelsTr" / "a.nii.gz").write_text("corrected")
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"patient_pattern": "(.)"}))
    later = time.time() + 60
    os.utime(raw / "dataset.json", (later, later))
    with pytest.raises(InputError, match=r"changed after .*written: dataset\.json, labelsTr/a\.nii\.gz; copy"):
        _own("new", overwrite=True)
    assert (raw / "labelsTr" / "a.nii.gz").read_text() == "corrected"


def test_a_case_that_was_moved_in_is_not_lost(nnunet_folders, tmp_path):
    _own("old")
    raw = nnunet_folders / "raw" / "Dataset007_Test"
    for name in ("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"):
        (raw / name).parent.mkdir(exist_ok=True)
        (tmp_path / "moved").write_text("mine")
        os.utime(tmp_path / "moved", (10 ** 9, 10 ** 9))
        (tmp_path / "moved").rename(raw / name)
    with pytest.raises(InputError, match=r"added or changed .*: imagesTr/b_0000\.nii\.gz, labelsTr/b\.nii\.gz"):
        _own("new", overwrite=True)


def test_a_data_set_that_is_a_link_is_not_replaced(nnunet_folders, tmp_path):
    _own("old")
    raw = nnunet_folders / "raw" / "Dataset007_Test"
    raw.rename(tmp_path / "elsewhere")
    raw.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="Dataset007_Test: is a link, which --overwrite does not replace"):
        _own("new", overwrite=True)
    assert (raw / "labelsTr" / "a.nii.gz").read_text() == "old"


def test_what_is_left_of_a_replaced_data_set_and_cannot_be_removed_is_named(nnunet_folders, monkeypatch):
    _own("old")
    (nnunet_folders / "raw" / ".Dataset007_Test.old").mkdir()
    # as on a busy network drive
    monkeypatch.setattr("nnunet_confkd.data.folders.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(InputError, match=r"\.Dataset007_Test\.old: is left .* remove it yourself"):
        _own("new", overwrite=True)
    assert (nnunet_folders / "raw" / "Dataset007_Test" / "labelsTr" / "a.nii.gz").read_text() == "old"


def test_other_permissions_are_no_change(nnunet_folders):
    _own("old")
    for path in (nnunet_folders / "raw" / "Dataset007_Test").rglob("*"):
        path.chmod(0o755)
    _own("new", overwrite=True)
    assert _texts(nnunet_folders) == ("new", "new")


def test_a_data_set_with_models_is_not_replaced(nnunet_folders):
    _own("old")
    (nnunet_folders / "results" / "Dataset007_Test").mkdir()
    with pytest.raises(InputError, match="results/Dataset007_Test: was made of the data set that --overwrite would"):
        _own("new", overwrite=True)
    (nnunet_folders / "results" / "Dataset007_Test").rmdir()
    assert _texts(nnunet_folders) == ("old", "old")


def test_a_data_set_of_another_name_keeps_the_id(nnunet_folders):
    _own("old")
    with pytest.raises(InputError, match="the id 7 is taken by .*Dataset007_Test"):
        _own("new", name="Other", overwrite=True)
    with pytest.raises(InputError, match="the id 7 belongs to Dataset007_Test: .* give --name Test; else"):
        require_free_id(7, (nnunet_folders / "raw" / "Dataset007_Other",))  # as mix --overwrite does


KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from data.test_folders import _own
steps = iter(range(99))

def killing(function):
    def killed(*args, **options):
        if next(steps) == int(sys.argv[1]):
            os._exit(9)
        return function(*args, **options)
    return killed

Path.rename, shutil.rmtree = killing(Path.rename), killing(shutil.rmtree)
_own("new", overwrite=True)
"""


@pytest.mark.parametrize("step", range(10))
def test_a_killed_process_leaves_the_old_or_the_new_data_set_whole(nnunet_folders, step):
    _own("old")
    tests = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(step), str(tests)], capture_output=True, text=True)
    assert killed.returncode == (9 if step < 8 else 0), killed.stderr
    assert find_dataset(7) == "Dataset007_Test"
    for left in nnunet_folders.glob("*/.*"):  # the next command that writes removes it
        shutil.rmtree(left) if ".part" in left.name else left.unlink()
    assert _texts(nnunet_folders) == (("old",) * 2 if step < 3 else ("new",) * 2)
    _own("newest", overwrite=True)
    assert _texts(nnunet_folders) == ("newest",) * 2
