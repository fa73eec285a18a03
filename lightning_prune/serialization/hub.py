"""Folders of pruned networks on the Hugging Face hub: upload, and download into the cache.

``huggingface_hub`` is needed for these two only: ``pip install lightning-prune[hub]``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["CARD", "CONFIG", "RECORD", "WEIGHTS", "downloaded", "push_pretrained"]

WEIGHTS, CONFIG, RECORD, CARD = "model.safetensors", "config.json", "record.json", "README.md"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs its package: pip install 'lightning-prune[hub]'"
        ) from error
    return huggingface_hub


def push_pretrained(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a pruned network",
    endpoint: str | None = None,
) -> str:
    """Upload a folder that :func:`save_pretrained` wrote to the Hugging Face hub, and return its address.

    Args:
        folder: the folder; all files in it are uploaded.
        repo_id: ``"user/name"``; the repository is made if there is none.
        private: whether a new repository is visible to you only.
        token: access token; None: the one of ``hf auth login``, or of the variable ``HF_TOKEN``.
        revision: branch; None: the main one.
        message: of the commit.
        endpoint: address of the hub; None: that of the variable ``HF_ENDPOINT``, or huggingface.co.

    Raises:
        FileNotFoundError: the folder lacks weights, configuration or model card.
        ValueError: ``repo_id`` has another form.
        ImportError: ``huggingface_hub`` is not installed.

    Example:
        >>> try:
        ...     push_pretrained("no/such/folder", "me/small-unet")
        ... except FileNotFoundError as error:
        ...     print(error)
        no/such/folder lacks model.safetensors, config.json, README.md: save_pretrained writes them
    """
    folder = Path(folder)
    if missing := [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: save_pretrained writes them")
    if not REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no repository: give user/name")
    api = _hub().HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    return f"{api.endpoint}/{repo_id}"


def downloaded(
    source: str | Path, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Path:
    """Return the folder of a pruned network: ``source`` itself, or the download of a repository on the hub.

    Raises:
        FileNotFoundError: ``source`` is neither a folder nor the name of a repository.
        ImportError: it is one, and ``huggingface_hub`` is not installed.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"{source} is neither a folder nor a repository (user/name) on the hub")
    return Path(_hub().snapshot_download(source, revision=revision, token=token, endpoint=endpoint))
