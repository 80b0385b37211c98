"""Folders of checkpoints, local or by their name on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Weights in other formats are not downloaded: they are large, and some can run code.
_ALLOW_PATTERNS = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.codes", "*.tiktoken"),
    "LICENSE*",
]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def resolve_checkpoint_folder(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """Returns the local folder of a checkpoint, downloaded from the Hub if necessary.

    Args:
        name_or_path: Local folder, or `owner/name` on the Hub. A local folder has precedence.
        revision: Branch, tag or commit on the Hub. None: the default branch.

    Returns:
        The local folder, or the folder in the Hub's cache. A path that is neither a folder nor a
        valid name on the Hub is returned unchanged.

    Raises:
        NotADirectoryError: The path is a file.
        FileNotFoundError: The Hub has no such name, or access to it is restricted.
        OSError: The Hub cannot be reached.

    Example:
        >>> import tempfile
        >>> from jlora.checkpoints import resolve_checkpoint_folder
        >>> resolve_checkpoint_folder(tempfile.gettempdir()).is_dir()
        True
    """
    path = Path(name_or_path)
    if path.is_file():
        kind = ", and may be an adapter" if path.suffix == ".safetensors" else ""
        raise NotADirectoryError(
            f"{path} is a file{kind}. Give the folder of the base model, or its owner/name on the "
            f"Hub."
        )
    if path.is_dir() or not isinstance(name_or_path, str) or not _REPO_ID.fullmatch(name_or_path):
        return path
    # Imported here: a local folder needs no network.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name_or_path, revision=revision, allow_patterns=_ALLOW_PATTERNS
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name_or_path!r} is not a local folder, and the Hub has no repository of that name "
            f"that you may read ({type(error).__name__}). Check the name, or log in with `hf auth "
            f"login`."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise OSError(
            f"{name_or_path!r} is not a local folder and not in the Hub's cache, and the Hub "
            f"cannot be reached ({type(error).__name__}). Download it on a machine with a network, "
            f"using `hf download {name_or_path}`, and pass its folder."
        ) from error
    return Path(folder)
