from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nnunet_confkd import cli
from nnunet_confkd.data.download import SOURCES, Source, download
from nnunet_confkd.errors import InputError

CONTENT = {"Task99_Small/dataset.json": b"{}", "Task99_Small/imagesTr/a.nii.gz": b"image"}


def _archive(file, content):
    with tarfile.open(file, "w") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """A local server of the folder `public`, and the URL of a file in it; the requests are counted."""
    public = tmp_path / "public"
    public.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        requests = []

        def log_message(self, *_):
            self.requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(public))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield public, lambda name: f"http://127.0.0.1:{running.server_port}/{name}"
        running.shutdown()


def test_a_data_set_is_fetched_verified_and_unpacked(server, tmp_path):
    public, url = server
    source = Source(url("small.tar"), _archive(public / "small.tar", CONTENT), "Task99_Small", "none")
    folder = download("small", tmp_path / "new" / "here", source)
    assert folder == tmp_path / "new" / "here" / "Task99_Small"
    assert {
        f.relative_to(folder.parent).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    } == CONTENT
    assert [f.name for f in folder.parent.iterdir()] == ["Task99_Small"]  # neither the archive nor anything unfinished


@pytest.mark.parametrize("problem", ["checksum", "missing", "no archive", "leaves the folder", "other folder"])
def test_what_is_not_as_published_is_refused_and_leaves_nothing(server, tmp_path, problem):
    public, url = server
    content = {"../evil.txt": b"evil", **CONTENT} if problem == "leaves the folder" else CONTENT
    md5 = _archive(public / "small.tar", content)
    if problem == "no archive":
        (public / "small.tar").write_bytes(b"no archive")
        md5 = hashlib.md5(b"no archive").hexdigest()
    source = Source(
        url("other.tar" if problem == "missing" else "small.tar"),
        "0" * 32 if problem == "checksum" else md5,
        "Task98_Other" if problem == "other folder" else "Task99_Small",
        "none",
    )
    target = tmp_path / "here"
    with pytest.raises(InputError, match=r"small\.tar|other\.tar"):
        download("small", target, source)
    assert list(target.iterdir()) == []
    assert not (tmp_path / "evil.txt").exists()


def test_no_server_is_an_error_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        SOURCES, "hippocampus", Source("http://127.0.0.1:1/x.tar", "0" * 32, "Task04_Hippocampus", "none")
    )
    assert cli.main(["download", "hippocampus", "--target", str(tmp_path)]) == 1
    assert "http://127.0.0.1:1/x.tar: could not be fetched" in capsys.readouterr().err


def test_the_command_tells_what_comes_next(server, tmp_path, monkeypatch, capsys):
    public, url = server
    source = Source(url("small.tar"), _archive(public / "small.tar", CONTENT), "Task99_Small", "CC BY-SA 4.0")
    monkeypatch.setitem(SOURCES, "hippocampus", source)
    assert cli.main(["download", "hippocampus", "--target", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert "CC BY-SA 4.0" in out and f"confkd convert msd --source {tmp_path / 'x' / 'Task99_Small'} --id 4" in out


def test_an_existing_folder_stays(tmp_path):
    mine = tmp_path / "Task04_Hippocampus" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        download("hippocampus", tmp_path)
    assert mine.read_text() == "mine"


def test_a_python_that_cannot_unpack_safely_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(tarfile, "data_filter")  # as before 3.10.12 and 3.11.4
    assert cli.main(["download", "hippocampus", "--target", str(tmp_path / "x")]) == 1
    assert "cannot unpack archives safely; use Python 3.10.12, 3.11.4 or newer" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_published_checksum_is_the_one_named_by_the_decathlon():
    assert SOURCES["hippocampus"].md5 == "9d24dba78a72977dbd1d2e110310f31b"
