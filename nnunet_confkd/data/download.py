"""Download a public data set for a first try from where its publishers put it."""
from __future__ import annotations

import platform
import posixpath
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunet_confkd.arguments import Parser
from nnunet_confkd.errors import InputError
from nnunet_confkd.files import new_folder


@dataclass(frozen=True)
class Source:
    """Where a data set is published.

    Attributes:
        url: Of a tar archive.
        md5: Checksum of the archive.
        folder: The only folder at the top of the archive.
        licence: The licence, and what to cite.
    """
    url: str
    md5: str
    folder: str
    licence: str


SOURCES = {
    "hippocampus": Source(  # Medical Segmentation Decathlon, task 4; Antonelli et al., Nature Communications 2022
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar", "9d24dba78a72977dbd1d2e110310f31b",
        "Task04_Hippocampus",
        "CC BY-SA 4.0; cite Antonelli et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9"),
}


def download(name: str, target: Path, source: Source | None = None) -> Path:
    """Download, verify and unpack a data set.

    Args:
        name: One of `SOURCES`.
        target: The folder that gets the data set's folder.
        source: Where to find it; None: as `SOURCES` says.

    Returns:
        The data set's folder.

    Raises:
        InputError: The folder exists, the server cannot be reached, the archive is not the published one, or this
            Python cannot unpack archives safely.

    Examples:
        >>> download("hippocampus", Path("."))  # doctest: +SKIP
        PosixPath('Task04_Hippocampus')
    """
    import pooch

    source = source or SOURCES[name]
    folder = Path(target) / source.folder
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"this Python ({platform.python_version()}) cannot unpack archives safely; use Python "
                         f"3.10.12, 3.11.4 or newer, or fetch {source.url} and unpack it yourself")
    if folder.exists():
        raise InputError(f"{folder}: exists already; remove it or choose another --target")
    try:
        with new_folder(folder) as new:
            archive = Path(pooch.retrieve(source.url, f"md5:{source.md5}", ".archive", new, progressbar=True))
            with tarfile.open(archive) as tar:
                tar.extractall(new, filter=partial(_without_top_folder, top=source.folder))
            archive.unlink()
    except (OSError, ValueError, tarfile.TarError) as error:  # pooch raises ValueError for a wrong checksum
        raise InputError(f"{source.url}: could not be fetched into {target}: {error}") from error
    return folder


def _without_top_folder(member: tarfile.TarInfo, path: str, *, top: str) -> tarfile.TarInfo | None:
    """Take the top folder from a member's name. Refuse all but files and folders, and what would leave the folder."""
    name = posixpath.normpath(member.name)
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"the archive holds {member.name!r}, which is no file (a link or a device)")
    if name == top and member.isdir():
        return None
    if not name.startswith(f"{top}/"):
        raise ValueError(f"the archive holds {member.name!r}, which is not in the folder {top}")
    return tarfile.data_filter(member.replace(name=name.removeprefix(f"{top}/"), deep=False), path)


def main(argv: list[str]) -> None:
    """Run `confkd download`."""
    parser = Parser(prog="confkd download", description=__doc__)
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--target", type=Path, default=Path("."), metavar="DIR",
                        help="the folder to put it in; default: here")
    args = parser.parse_args(argv)
    folder = download(args.name, args.target)
    print(f"{folder} ({SOURCES[args.name].licence})\nnext: confkd convert msd --source {folder} --id 4")
