"""Errors of damaged files name the file, whichever words the file's own name is made of."""

from __future__ import annotations

import contextlib

import pytest

from jlora.checkpoints.text_files import name_file_in_errors


@pytest.mark.parametrize("message", ["a value of the run is wrong", "run it again", "no number"])
def test_error_without_the_file_gets_its_name(message: str) -> None:
    with pytest.raises(ValueError, match="^run/config.json: ") as caught, _block():
        raise ValueError(message)
    assert str(caught.value) == f"run/config.json: {message}"


@pytest.mark.parametrize("message", ["run/other.json is missing", "run: the folder", "config.json"])
def test_error_with_the_file_stays(message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"), _block():
        raise ValueError(message)


def _block() -> contextlib.AbstractContextManager[None]:
    return name_file_in_errors("run/config.json")
