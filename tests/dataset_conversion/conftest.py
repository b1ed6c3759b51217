"""Fixtures of several converters' tests."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_confkd.errors import InputError


@pytest.fixture
def refusal(nnunet_folders, tmp_path, capsys) -> Callable[..., str]:
    """Convert, see that it is refused and that nothing is printed and nothing has changed; return the text."""
    def state() -> dict:
        return {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).digest()) if file.is_file() else None
                for file in tmp_path.rglob("*")}

    def refuse(convert: Callable, source: Path, **options) -> str:
        before = state()
        with pytest.raises(InputError) as error:
            convert(source, 21, processes=1, **options)
        assert state() == before and capsys.readouterr().out == ""
        assert not list((nnunet_folders / "raw").iterdir()) and not list((nnunet_folders / "preprocessed").iterdir())
        return str(error.value)

    return refuse
