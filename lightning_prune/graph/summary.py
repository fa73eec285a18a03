"""Sizes of a network layer by layer, before and after a cut, with what is pinned and what is coupled."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult

from lightning_prune.graph.costs import CostModel
from lightning_prune.graph.coupling import CoupledLayers, coupled_layers
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.graph.summary_html import html_of
from lightning_prune.graph.summary_text import renderables
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.modules import within_any

__all__ = ["Change", "LayerSummary", "NetworkSummary", "summarise"]

OTHER = "norms and other operators"
#: name of a weight, another parameter or a module, and its cost
Cost = tuple[str, float]


class GraphLike(Protocol):
    """The attributes of a :class:`~lightning_prune.ChannelGraph` that its summary shows."""

    layers: dict[str, Units]
    pinned: dict[int, str]
    types: dict[str, type]
    unsupported: dict[str, list[str]]
    notes: list[str]

    @property
    def cost_models(self) -> dict[str, CostModel]:
        """Resource -> its cost model."""

    def kept(self, remove: Iterable[int] = ()) -> NDArray[np.bool_]:
        """Return a mask over units."""


@dataclass(frozen=True)
class Change:
    """A number before and after a cut."""

    before: int
    after: int


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        name: qualified name of its module, or of its weight if the module has several.
        kind: class of the module.
        channels: number of filters.
        costs: resource -> the cost of the layer.
        pinned: reason -> number of filters that must stay for it.
        group: number of the coupled layers that it belongs to, from 0; None if it is coupled to none.
        closed: the limit for which it loses no more filters; empty if there is none.
    """

    name: str
    kind: str
    channels: Change
    costs: Mapping[str, Change]
    pinned: Mapping[str, int] = field(default_factory=dict)
    group: int | None = None
    closed: str = ""


@dataclass(frozen=True)
class NetworkSummary:
    """A network layer by layer, before and after a cut. Made by ``graph.summary()`` and ``plan.summary()``.

    Printed by rich, it fits the width of the terminal; in a notebook it is a table. ``str`` gives plain text.

    Attributes:
        layers: in the order of the network's tensors.
        others: resource -> cost of everything that is not a layer: norms, products of activations, ...
        totals: resource -> cost of the network.
        groups: layers that share channels.
        targets: resource -> the budget, as an amount.
        notes: remarks: how the selection ended, what the trace met.
        cut: whether something is removed; without a cut only one size is shown.
        measured: how the latency of the layers was measured, or why it was not; empty if it was not requested.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 2, 3))
        >>> summary = trace(net, torch.zeros(1, 1, 8, 8)).summary(remove=[0, 1])
        >>> summary.layers[0].channels, summary.layers[1].costs["params"]
        (Change(before=8, after=6), Change(before=146, after=110))
    """

    layers: Sequence[LayerSummary]
    others: Mapping[str, Change]
    totals: Mapping[str, Change]
    groups: Sequence[CoupledLayers] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    cut: bool = True
    measured: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSummary:
        """Return the summary that :meth:`to_dict` made these values of.

        Raises:
            KeyError, TypeError, AttributeError: they are of something else.
        """
        return cls(
            [_layer_from(layer) for layer in values["layers"]],
            _changes(values["others"]),
            _changes(values["totals"]),
            [CoupledLayers(**{**group, "layers": tuple(group["layers"])}) for group in values["groups"]],
            dict(values["targets"]),
            list(values["notes"]),
            values["cut"],
            values.get("measured", ""),
        )

    def with_costs(
        self, resource: str, layers: Sequence[str], before: Iterable[Cost], after: Iterable[Cost]
    ) -> NetworkSummary:
        """Return a copy with one more resource, whose costs in both networks are known.

        Args:
            resource: its name.
            layers: names of the weights of the layers, in order.
            before: names of weights, parameters or modules, with their costs in the dense network; a name may come
                several times.
            after: the same of the smaller network.

        Example:
            >>> layer = LayerSummary("conv", "Conv2d", Change(8, 4), {})
            >>> costs = [("conv.weight", 5), ("conv.weight", 5), ("norm", 2)]
            >>> summary = NetworkSummary([layer], {}, {}).with_costs("latency", ["conv.weight"], costs, costs[1:])
            >>> summary.layers[0].costs, summary.totals
            ({'latency': Change(before=10, after=5)}, {'latency': Change(before=12, after=7)})
        """
        sums = [_sums(costs, layers) for costs in (before, after)]
        changes = {name: Change(sums[0][name], sums[1][name]) for name in sums[0]}
        return replace(
            self,
            layers=[
                replace(layer, costs={**layer.costs, resource: changes[name]})
                for layer, name in zip(self.layers, layers, strict=True)
            ],
            others={**self.others, resource: changes[OTHER]},
            totals={**self.totals, resource: Change(*(sum(each.values()) for each in sums))},
        )

    def json(self) -> str:
        """Return the summary as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def html(self) -> str:
        """Return a table with its legend, as a piece of HTML that needs nothing else."""
        return html_of(self)

    def save(self, path: str | Path) -> None:
        """Write ``.json``, ``.html`` (a whole page), ``.svg`` (the table as a terminal shows it), or plain text."""
        head = "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        page = f"{head}<title>{Path(path).stem}</title>{self.html()}\n"
        texts = {".json": self.json, ".html": lambda: page, ".svg": self.svg}
        write_text(path, texts.get(Path(path).suffix, self.__str__)())

    def svg(self, title: str = "lightning-prune plan") -> str:
        """Return the table as a picture of a terminal with 100 columns."""
        console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
        console.print(self)
        return console.export_svg(title=title)

    def text(self, width: int = 100) -> str:
        """Return plain text of at most so many columns (60 or more are readable)."""
        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from renderables(self, options.max_width)

    def _repr_html_(self) -> str:
        return self.html()


def _layer_from(values: Mapping[str, Any]) -> LayerSummary:
    nested = {"channels": Change(**values["channels"]), "costs": _changes(values["costs"])}
    return LayerSummary(**{**values, **nested})


def _changes(values: Mapping[str, Any]) -> dict[str, Change]:
    return {name: Change(**change) for name, change in values.items()}


def summarise(
    graph: GraphLike,
    remove: Iterable[int] = (),
    targets: Mapping[str, float] | None = None,
    closed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    vanished: Sequence[str] = (),
) -> NetworkSummary:
    """Return the sizes of each layer of ``graph`` with and without the units in ``remove``.

    The costs of the layers and of the others add up to the totals exactly.

    Args:
        graph: of the network.
        remove: units.
        targets: resource -> the budget, as an amount.
        closed: layer or block -> why it loses no more filters.
        notes: remarks, before those of the trace.
        vanished: names of modules that go as a whole.
    """
    removed = list(remove)
    masks = graph.kept(), graph.kept(removed)
    costs = {
        resource: _costs(model, graph.layers, masks, vanished)
        for resource, model in graph.cost_models.items()
    }
    groups = [group for group in coupled_layers(graph.layers) if len(group.layers) > 1]
    group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
    labels = _labels(graph.layers)
    layers = [
        LayerSummary(
            labels[name],
            graph.types[module_of(name)].__name__ if module_of(name) in graph.types else "Parameter",
            Change(
                int(masks[0][units].sum()), 0 if within_any(name, vanished) else int(masks[1][units].sum())
            ),
            {resource: per_layer[name] for resource, per_layer in costs.items()},
            dict(Counter(graph.pinned[unit] for unit in units.tolist() if unit in graph.pinned)),
            group_of.get(name),
            _closed(name, closed or {}),
        )
        for name, units in graph.layers.items()
    ]
    unsupported = [f"no rule for {operator}: its channels stay" for operator in graph.unsupported]
    named = [replace(group, layers=tuple(labels[layer] for layer in group.layers)) for group in groups]
    return NetworkSummary(
        layers,
        {resource: per_layer[OTHER] for resource, per_layer in costs.items()},
        {
            resource: Change(
                *(sum(getattr(each, at) for each in per_layer.values()) for at in ("before", "after"))
            )
            for resource, per_layer in costs.items()
        },
        named,
        dict(targets or {}),
        [*notes, *graph.notes, *unsupported],
        bool(removed or vanished),
    )


def _labels(layers: Iterable[str]) -> dict[str, str]:
    """Return the name of the module for each weight, or of the weight where a module has several."""
    count = Counter(map(module_of, layers))
    return {name: name if count[module_of(name)] > 1 else module_of(name) for name in layers}


def _costs(
    model: CostModel,
    layers: Mapping[str, Units],
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    vanished: Sequence[str] = (),
) -> dict[str, Change]:
    """Return the cost of each layer, and of the others under ``OTHER``, with each of two masks of units.

    With the second one, what belongs to ``vanished`` modules costs nothing.
    """
    names = [term.layer for term in model.terms]
    values = [model.per_term(mask).tolist() for mask in masks]
    before = _sums(zip(names, values[0], strict=True), layers)
    remaining = (cost for cost in zip(names, values[1], strict=True) if not within_any(cost[0], vanished))
    after = _sums(remaining, layers)
    return {name: Change(before[name], after[name]) for name in before}


def _sums(costs: Iterable[Cost], layers: Collection[str]) -> dict[str, int]:
    """Return the sum of the costs of each layer, and of the others under ``OTHER``."""
    first = {module_of(name): name for name in reversed(list(layers))}
    total = dict.fromkeys([*layers, OTHER], 0)
    for name, value in costs:
        total[_owner(name, total, first)] += int(value)
    return total


def _owner(name: str, layers: Collection[str], first: Mapping[str, str]) -> str:
    """Return the layer that a term belongs to, which names a weight, another parameter or a module."""
    if name in layers:
        return name
    return first.get(name) or first.get(module_of(name)) or OTHER


def _closed(name: str, closed: Mapping[str, str]) -> str:
    """Return the reason for which a layer, or the innermost block around it, loses no more filters."""
    parts = module_of(name).split(".")
    names = [name, *(".".join(parts[:end]) for end in range(len(parts), 0, -1))]
    return next((closed[each] for each in names if each in closed), "")
