"""Model card: the README.md of a folder, whose head in YAML the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lightning_prune.serialization.factories import TARGET, is_known

__all__ = ["ModelCard"]

#: task -> how the hub calls it, and its main metric
PIPELINES = {"segmentation": "image-segmentation", "classification": "image-classification"}
METRICS = {"miou": ("mean_iou", "mean IoU"), "accuracy": ("accuracy", "accuracy")}


@dataclass(frozen=True)
class ModelCard:
    """What a model card says besides what the network itself shows.

    Args:
        name: of the model; also its heading.
        license: identifier of the hub, such as ``"mit"``; ``"unknown"`` as long as you have not chosen one.
        task: ``"segmentation"`` or ``"classification"``; others are left out of the head.
        data: name of the training data.
        scores: metric -> value on the test set: ``miou``, ``accuracy``.
        class_names: names of the classes, in the order of the outputs.
        input_shape: of the example input, batch included.
        macs: share of the dense network's multiply-accumulates that is left; None: not stated.
        tables: tables in Markdown, such as sizes and latency.
        training: sentences about the training.

    Example:
        >>> card = ModelCard("small-unet", license="mit", task="segmentation", data="slices", scores={"miou": 0.91})
        >>> print(card.head().splitlines()[2])
        license: mit
    """

    name: str = "pruned network"
    license: str = "unknown"
    task: str = ""
    data: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    input_shape: Sequence[int] = ()
    macs: float | None = None
    tables: Sequence[str] = ()
    training: Sequence[str] = ()

    def head(self) -> str:
        """Return the YAML with its rules of three dashes."""
        tags = ["pruning", "pytorch", "lightning-prune"]
        head: dict[str, Any] = {"library_name": "lightning-prune", "license": self.license, "tags": tags}
        if pipeline := PIPELINES.get(self.task):
            head |= {"pipeline_tag": pipeline, "tags": [*tags, pipeline]}
            if results := self._results(pipeline):
                head["model-index"] = [{"name": self.name, "results": results}]
        return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"

    def _results(self, pipeline: str) -> list[dict[str, Any]]:
        metrics = [
            {"type": METRICS[key][0], "name": f"test {METRICS[key][1]}", "value": round(float(value), 4)}
            for key, value in self.scores.items()
            if key in METRICS and value == value
        ]
        data = self.data or "own data"
        dataset = {"name": data, "type": data.lower().replace(" ", "-"), "split": "test"}
        return [{"task": {"type": pipeline}, "dataset": dataset, "metrics": metrics}] if metrics else []

    def text(
        self, factory: Mapping[str, Any] | None, shares: Mapping[str, float], files: Sequence[str]
    ) -> str:
        """Return the whole card.

        Args:
            factory: call that builds the dense network; None: unknown.
            shares: ``"macs"`` and ``"params"`` -> share of the dense network that is left.
            files: names of the other files in the folder.
        """
        parts = [self.head(), f"# {self.name}\n", self._summary(factory, shares)]
        if self.tables:
            parts += ["## Figures\n", *(f"{table}\n" for table in self.tables)]
        parts += ["## How to load\n", self._loading(factory)]
        if self.training:
            parts += ["## Training\n", "\n".join(self.training) + "\n"]
        listed = "\n".join(f"- `{name}`: {FILES.get(name, 'further file')}" for name in files)
        return "\n".join([*parts, "## Files\n", listed + "\n"])

    def _summary(self, factory: Mapping[str, Any] | None, shares: Mapping[str, float]) -> str:
        what = f"`{_call(factory)}`" if factory else "a network"
        left = " and ".join(
            f"{100 * share:.1f} % of the {LABELS[key]}" for key, share in shares.items() if key in LABELS
        )
        size = f": {left} are left" if left else ""
        trained = f" It was trained on {self.data}." if self.data else ""
        return (
            f"This is {what}, made physically smaller by "
            f"[lightning-prune](https://pypi.org/project/lightning-prune/){size}.{trained}\n"
        )

    def _loading(self, factory: Mapping[str, Any] | None) -> str:
        known = is_known(factory)
        build = "make_dense_network()" if known or not factory else _written(factory)
        imported = (
            "" if known or not factory else "from {0} import {2}\n".format(*factory[TARGET].rpartition("."))
        )
        by_hand = (
            f"```python\nfrom lightning_prune import load_pruned\n{imported}\n"
            f'net = load_pruned({build}, "FOLDER")\n```\n'
        )
        by_name = (
            "```python\nfrom lightning_prune import load_pretrained\n\n"
            'net = load_pretrained("FOLDER")  # or "user/name" on the Hugging Face hub\n```\n'
        )
        note = "`make_dense_network` builds the network as for training, with any weights.\n"
        if build != "make_dense_network()":
            note = (
                f"`{factory[TARGET]}` is code of its own, which the folder does not hold.\n"
                if factory
                else note
            )
        shape = tuple(self.input_shape)
        inputs = f"The input has the shape `(n, {', '.join(map(str, shape[1:]))})`.\n" if shape else ""
        names = (
            f"Outputs are logits of the classes {', '.join(self.class_names)}.\n" if self.class_names else ""
        )
        loading = f"{by_name}\nor, with a network that you build yourself:\n\n" if known else ""
        return f"`pip install lightning-prune`, then\n\n{loading}{by_hand}\n{note}\n{inputs}{names}"


def _written(factory: Mapping[str, Any]) -> str:
    """Return the call of a class or function with its arguments, as code."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in factory.items() if name != TARGET)
    return f"{factory[TARGET].rpartition('.')[2]}({arguments})"


def _call(factory: Mapping[str, Any]) -> str:
    """Return how a network is called: of a function that makes many, with the name that it was given."""
    target = str(factory[TARGET])
    name = next((factory[key] for key in ("model_name", "arch", "name") if key in factory), None)
    return f'{target}("{name}")' if target.endswith(("create_model", "get_model")) and name else target


LABELS = {"macs": "multiply-accumulates", "params": "parameters"}
FILES = {
    "model.safetensors": "weights, with the pruning record in the metadata",
    "record.json": "the pruning record: which channels of the dense network are left",
    "config.json": "how to build the dense network, and what it was trained for",
    "model.onnx": "the pruned network in ONNX",
    "model.int8.onnx": "the pruned network in ONNX, with convolutions and matrix products in INT8",
}
