"""A public data set for a first try, from where its publishers put it."""
from __future__ import annotations

import argparse
import platform
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from nnunet_confkd.errors import InputError


@dataclass(frozen=True)
class Source:
    url: str
    md5: str
    folder: str  # that the archive holds
    licence: str


SOURCES = {
    "hippocampus": Source(  # Medical Segmentation Decathlon, task 4; Antonelli et al., Nature Communications 2022
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar", "9d24dba78a72977dbd1d2e110310f31b",
        "Task04_Hippocampus", "CC BY-SA 4.0; cite Antonelli et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9"),
}


def download(name: str, target: Path, source: Source | None = None) -> Path:
    """Fetch, verify and unpack a data set into a new folder in `target`; returns that folder.

    Raises InputError where the folder exists, the server cannot be reached, or what came is not what was published; and
    for a Python that cannot unpack archives safely.
    """
    import pooch

    source = source or SOURCES[name]
    target = Path(target)
    folder, archive = target / source.folder, target / f".{source.folder}.download"
    unpacked = target / f".{source.folder}.unfinished"
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"this Python ({platform.python_version()}) cannot unpack archives safely; use Python "
                         "3.10.12, 3.11.4 "
                         f"or newer, or fetch {source.url} and unpack it yourself")
    if folder.exists():
        raise InputError(f"{folder}: exists already; remove it or choose another --target")
    try:
        target.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(source.url, f"md5:{source.md5}", archive.name, target, progressbar=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter=_plain)
        (unpacked / source.folder).rename(folder)
    except (OSError, ValueError, tarfile.TarError) as error:  # pooch: ValueError for a wrong checksum
        raise InputError(f"{source.url}: could not be fetched into {target}: {error}") from error
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Files and folders only, of which tarfile's own filter refuses those that would leave the folder."""
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"the archive holds {member.name!r}, which is no file (a link or a device)")
    return tarfile.data_filter(member, folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd download", description=__doc__)
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--target", type=Path, default=Path("."), metavar="DIR", help="the folder to put it in; default: here")
    args = parser.parse_args(argv)
    folder = download(args.name, args.target)
    print(f"{folder} ({SOURCES[args.name].licence})\nnext: confkd convert msd --source {folder} --id 4")
