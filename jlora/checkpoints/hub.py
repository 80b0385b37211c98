"""Folders of checkpoints, on this machine or by their name on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Weights in other formats are not fetched: they are large, and some can run code.
_ALLOW_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def resolve_checkpoint_folder(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """The folder of that name; one that is not here is fetched from the Hub and kept in its cache.

    Args:
        name_or_path: A folder, or `owner/name` on the Hub.
        revision: Of the Hub's: a branch, tag or commit.

    Raises:
        FileNotFoundError: There is no such folder here, and it is no name on the Hub.
        OSError: The Hub cannot be reached, or does not hand it out.
    """
    path = Path(name_or_path)
    if path.is_dir() or not isinstance(name_or_path, str) or not _REPO_ID.fullmatch(name_or_path):
        return path
    # Loaded here: a folder needs no network.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name_or_path, revision=revision, allow_patterns=_ALLOW_PATTERNS
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder here, and the Hub has none of that name that you may read "
            f"({type(error).__name__}). Check the name, or log in with `hf auth login`."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise OSError(
            f"{name_or_path!r} is no folder here and not in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}). Fetch it where there is a network, with `hf download "
            f"{name_or_path}`, and give its folder."
        ) from error
    return Path(found)
