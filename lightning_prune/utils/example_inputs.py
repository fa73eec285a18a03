"""Example inputs of a forward: taken from batches, and described by shapes in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = [
    "Example",
    "as_example",
    "batched_tensors",
    "example_of_shapes",
    "first_images",
    "inputs_of",
    "is_image_list",
    "joined_image_lists",
    "num_samples",
    "on_device",
    "one_sample",
    "shapes_of",
]

#: Positional and keyword inputs of a forward.
Example = tuple[tuple[Any, ...], dict[str, Any]]


def as_example(array: Any) -> Example:
    """Return the inputs that Lightning's ``example_input_array`` describes.

    A tuple has the positional inputs, a mapping the keyword inputs; anything else is the only input.
    """
    if isinstance(array, Mapping):
        return (), dict(array)
    return (array if isinstance(array, tuple) else (array,)), {}


def inputs_of(batch: Any, forward: Callable[..., Any]) -> Example | None:
    """Return the part of a batch that ``forward`` takes, or None if the batch has no tensor.

    A tensor is itself the input. Of a sequence it is the first entry, or the first n entries if ``forward`` has n
    arguments without default and all of these are tensors. Of a mapping it is the entries named like arguments
    of ``forward``, or the first entry if there are none. A list of images and a list of their targets (mappings), as
    detectors take them, stay lists; the targets are passed on if ``forward`` has a second argument.

    Example:
        >>> image, mask = torch.zeros(2, 3), torch.ones(2)
        >>> inputs_of([image, mask], lambda x: x)[0][0] is image
        True
        >>> list(inputs_of({"mask": mask, "image": image}, lambda image: image)[1])
        ['image']
        >>> len(inputs_of([image, image, mask], lambda left, right: left)[0])
        2
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        named = {name: batch[name] for name in inspect.signature(forward).parameters if name in batch}
        return ((), named) if named else inputs_of(list(batch.values()), forward)
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch):
        if _is_detection(batch):
            takes_targets = len(inspect.signature(forward).parameters) > 1
            return tuple(list(part) for part in batch[: 1 + takes_targets]), {}
        number = _num_required(forward)
        several = 1 < number <= len(batch) and all(isinstance(x, Tensor) for x in batch[:number])
        return (tuple(batch[:number]), {}) if several else inputs_of(batch[0], forward)
    return None


def _is_detection(batch: Sequence[Any]) -> bool:
    """Whether a batch, or example, consists of a list of images and a list of a mapping for each of them."""
    if len(batch) < 2 or not _are_images(batch[0]) or not isinstance(batch[1], (list, tuple)):
        return False
    images, targets = batch[:2]
    return len(images) == len(targets) and all(isinstance(target, Mapping) for target in targets)


def _are_images(images: Any) -> bool:
    """Whether this is a list of images, (channels, height, width), which may differ in height and width."""
    return (
        isinstance(images, (list, tuple))
        and bool(images)
        and all(isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] <= 4 for image in images)
    )


def is_image_list(example: Example) -> bool:
    """Return whether the first input is a list of images, as detectors take them, and not a tensor."""
    return bool(example[0]) and _are_images(example[0][0])


def num_samples(example: Example | None) -> int:
    """Return the number of images of an example: the length of a list, or of the first tensor; 0 without any.

    Example:
        >>> image = torch.zeros(3, 8, 8)
        >>> num_samples((([image, image], [{}, {}]), {})), num_samples(((torch.zeros(5, 3),), {})), num_samples(None)
        (2, 5, 0)
    """
    if example is None:
        return 0
    if is_image_list(example):
        return len(example[0][0])
    return next((len(x) for x in batched_tensors(example)), 0)


def first_images(batch: Any, size: int, number: int) -> Any:
    """Return a copy of a batch of ``size`` images with only the first ``number`` of them."""
    if isinstance(batch, (list, tuple)) and _is_detection(batch):
        lists = [list(part[:number]) if isinstance(part, (list, tuple)) else part for part in batch]
        return tree_map_only(Tensor, Tensor.clone, tuple(lists))
    return tree_map_only(
        Tensor, lambda x: x[:number].clone() if x.dim() and len(x) == size > number else x, batch
    )


def joined_image_lists(examples: Sequence[Example]) -> Example:
    """Return one example of all images, and targets, of several examples that are lists of them.

    Raises:
        ValueError: an example has no list of images, or fewer lists than another.
    """
    if not all(map(is_image_list, examples)):
        raise ValueError("some are lists of images, others are not")
    lists = zip(*(args for args, _ in examples), strict=True)
    return tuple(list(chain(*parts)) for parts in lists), examples[0][1]


def _num_required(forward: Callable[..., Any]) -> int:
    """Number of positional arguments without default."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(
        x.kind in positional and x.default is x.empty for x in inspect.signature(forward).parameters.values()
    )


def one_sample(example: Example) -> Example:
    """Return a copy of the example with only the first sample of every tensor, or of every list of samples."""
    args, kwargs = example
    if args and _are_images(args[0]):
        first = tuple(part[:1] if isinstance(part, list) else part for part in args)
        return tree_map_only(Tensor, lambda x: x.detach().clone(), first), kwargs
    return tree_map(lambda x: x[:1].detach().clone() if isinstance(x, Tensor) and x.dim() else x, example)


def shapes_of(example: Example) -> list[Any]:
    """Return an example as plain values for a checkpoint; of each tensor only shape and dtype.

    Example:
        >>> shapes_of(((torch.zeros(1, 3),), {"scale": 2}))
        [[{'shape': [1, 3], 'dtype': 'float32'}], {'scale': 2}]
    """

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
        return x if isinstance(x, (int, float, str, type(None))) else str(x)

    def target(x: Any) -> Any:  # boxes and the like, which random numbers cannot replace
        return {**plain(x), "values": x.tolist()} if isinstance(x, Tensor) else plain(x)

    args, kwargs = example
    num_inputs = 1 if _is_detection(args) else len(args)
    inputs, targets = tree_map(plain, list(args[:num_inputs])), tree_map(target, list(args[num_inputs:]))
    return [[*inputs, *targets], dict(tree_map(plain, kwargs))]


def example_of_shapes(shapes: Sequence[Any]) -> Example:
    """Return an example of the shapes given by :func:`shapes_of`: random numbers, zeros for integer types.

    Example:
        >>> example_of_shapes([[{"shape": [1, 3], "dtype": "int64"}], {"scale": 2}])
        ((tensor([[0, 0, 0]]),), {'scale': 2})
    """

    def is_tensor(x: Any) -> bool:
        return isinstance(x, Mapping) and x.keys() - {"values"} == {"shape", "dtype"}

    def tensor(x: Any) -> Any:
        if not is_tensor(x):
            return x
        dtype, generator = getattr(torch, x["dtype"]), torch.Generator().manual_seed(0)
        if "values" in x:
            return torch.tensor(x["values"], dtype=dtype).reshape(x["shape"])
        if dtype.is_floating_point:
            return torch.rand(x["shape"], generator=generator).to(dtype)
        return torch.zeros(x["shape"], dtype=dtype)

    args, kwargs = tree_map(tensor, list(shapes), is_leaf=is_tensor)
    return tuple(args), kwargs


def batched_tensors(inputs: Any) -> list[Tensor]:
    """Return the tensors in a nested structure that have dimensions, the first of which lists the samples.

    Example:
        >>> inputs = ((torch.zeros(4, 3), torch.tensor(0.5)), {"mask": torch.ones(4)})
        >>> [len(tensor) for tensor in batched_tensors(inputs)]
        [4, 4]
    """
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]


def on_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device."""
    return tree_map_only(Tensor, lambda x: x.to(device), batch)
