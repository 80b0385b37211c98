"""Names of folders, here and on the Hub."""

from __future__ import annotations

import pathlib
from typing import Any

import huggingface_hub
import pytest

from jlora import models
from jlora.checkpoints.hub import resolve_checkpoint_folder

BASE = pathlib.Path(__file__).parents[1] / "models" / "data" / "decoders" / "llama"


def test_resolve_folder_local_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve_checkpoint_folder(BASE) == BASE
    assert resolve_checkpoint_folder(str(BASE)) == BASE
    for name in ("no-such-folder", "../a/b", "/abs/olute", "a/b/c", "a\0/b", ""):
        assert resolve_checkpoint_folder(name) == pathlib.Path(name)
    with pytest.raises(FileNotFoundError, match="no-such-folder is not a folder"):
        models.load("no-such-folder")


def test_load_hub_name_downloads_no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(BASE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model, params = models.load("owner/tiny-llama", revision="v1")
    assert asked["name"] == "owner/tiny-llama"
    assert asked["revision"] == "v1"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    assert model.config.hidden_size == 12
    assert params


def test_load_offline_error_names_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"not in the Hub's cache.*hf download owner/name"):
        models.load("owner/name")


def test_load_unknown_hub_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def fetch(*_: Any, **__: Any) -> str:
        raise Missing

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(FileNotFoundError, match="the Hub has no repository of that name"):
        models.load("owner/name")
