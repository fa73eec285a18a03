"""Folders of pruned networks in the shape of the Hugging Face hub: weights, record, configuration and model card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.serialization.carried_record import carried_record
from lightning_prune.serialization.factories import build_network, describe_factory
from lightning_prune.serialization.hub import CARD, CONFIG, RECORD, WEIGHTS, downloaded
from lightning_prune.serialization.json_file import read_json
from lightning_prune.serialization.model_card import ModelCard
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import load_pruned, save_pruned
from lightning_prune.utils.atomic import write_text

__all__ = ["load_pretrained", "save_pretrained"]

FORMAT = 1
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    record: PruningRecord | None = None,
    *,
    factory: Callable[..., nn.Module] | Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
) -> Path:
    """Write a pruned network into a folder that loads elsewhere, and that the Hugging Face hub shows.

    Files: ``model.safetensors`` (weights and record), ``record.json``, ``config.json``, ``README.md`` (model card).
    Other files in the folder stay, and are listed in the card.

    Args:
        model: the pruned network.
        folder: made if there is none; files of these names are replaced.
        record: what was removed from the dense network, for example ``callback.record``; None: the one that the
            network carries.
        factory: the call that builds the dense network: a function, a class, ``functools.partial`` of one with its
            arguments, or a mapping with ``"_target_"``. With it, networks of torchvision, timm,
            segmentation-models-pytorch and this package are built by their names; see :func:`load_pretrained`.
        card: further content of the model card.

    Returns:
        The folder.

    Raises:
        ValueError: the factory has no name, or the state_dict has an entry that is not a tensor.

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> from lightning_prune.segmentation import UNet
        >>> net = UNet(in_channels=1, classes=2, width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_pretrained(net, folder, factory=partial(UNet, in_channels=1, classes=2, width=4))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ...     type(load_pretrained(folder)).__name__
        ['README.md', 'config.json', 'model.safetensors', 'record.json']
        'UNet'
    """
    folder = Path(folder)
    record, card = (
        carried_record(model) if record is None else record,
        card or ModelCard(name=folder.resolve().name),
    )
    described = None if factory is None else describe_factory(factory)
    shares = {
        **({} if card.macs is None else {"macs": card.macs}),
        "params": _share_of_parameters(record, model),
    }
    save_pruned(model, record, folder / WEIGHTS)
    record.save(folder / RECORD)
    config = {
        "library_name": "lightning-prune",
        "format": FORMAT,
        "factory": described,
        "architectures": [type(model).__name__],
        "task": card.task,
        "input_shape": list(card.input_shape),
        "class_names": list(card.class_names),
        "shares": shares,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / CARD, card.text(described, shares, _others(folder)))
    return folder


def load_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    verify: bool = True,
) -> nn.Module:
    """Build the dense network that a folder names, cut it to its record, and load its weights.

    Networks of torchvision, timm, segmentation-models-pytorch and this package are built by their names, without a
    download of weights. For others, build the network and call ``load_pruned(network, folder)``.

    Args:
        source: folder that :func:`save_pretrained` wrote, or ``"user/name"`` on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        token: access token of the hub; None: the one that is stored.
        endpoint: address of the hub; None: that of the variable ``HF_ENDPOINT``, or huggingface.co.
        verify: see :func:`load_pruned`.

    Returns:
        The pruned network, in eval mode.

    Raises:
        RecordError: the folder is damaged, or names a network that is not built on the word of a file.
        FileNotFoundError: there is no such folder, or it has no ``config.json``.
        ImportError: the network's package is not installed, or ``huggingface_hub`` for a repository.

    Example:
        >>> try:
        ...     load_pretrained("no/such/folder/here")
        ... except FileNotFoundError as error:
        ...     print(error)
        no/such/folder/here is neither a folder nor a repository (user/name) on the hub
    """
    folder = downloaded(source, revision, token, endpoint)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: was it written by save_pretrained? load_pruned(network, folder) needs none"
        )
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise RecordError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise RecordError(f"{folder / CONFIG} is no configuration of lightning-prune in format {FORMAT}")
    return load_pruned(build_network(config.get("factory")), folder, verify).eval()


def _share_of_parameters(record: PruningRecord, model: nn.Module) -> float:
    """Return the share of the dense network's parameters that is left; 1 if it has none."""
    left = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = model.state_dict().keys()
    gone = {  # of whole blocks
        name: shape
        for name, (_, shape) in record.dense.items()
        if name not in names and shape is not None and not name.endswith(BUFFERS)
    }
    dense = sum(math.prod(record.shapes.get(name, shape)) for name, shape in {**sizes, **gone}.items())
    return left / dense if dense else 1.0


def _others(folder: Path) -> list[str]:
    """Return the names of the files of a folder without the card, the known ones first."""
    known = [WEIGHTS, RECORD, CONFIG]
    rest = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [*known, *(name for name in rest if name not in (*known, CARD))]
