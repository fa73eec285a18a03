"""The distillation losses of one training step: record the student, run the teacher, compare the two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.distillation.logit_losses import cwd, dist, hinton, standardised
from lightning_prune.distillation.logits import Kind
from lightning_prune.distillation.losses import attention_map, common_size, flow, mean_square, pool
from lightning_prune.distillation.taps import Tap
from lightning_prune.distillation.teacher import Teacher, TeacherError
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.example_inputs import Example

__all__ = ["Distiller", "Projections", "TapCall", "TapPair", "logits_of"]

LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hinton": hinton,
    "standardised": standardised,
    "cwd": cwd,
    "dist": dist,
}
KIND_LOSSES = ("hinton", "dist")  # take the kind of classification as an argument
FEATURE_LOSSES = ("attention", "fsp", "cwd_features")
CHANNEL_LOSSES = ("fsp", "cwd_features")  # student and teacher need the same channels
LOSSES = (*LOGIT_LOSSES, *FEATURE_LOSSES)


@dataclass(frozen=True)
class TapPair:
    """A tap of the student and the tap of the teacher that it is compared with."""

    student: Tap
    teacher: Tap


@dataclass
class TapCall:
    """Inputs, output and tapped features (module name -> tensor) of one forward of the student."""

    example: Example
    output: Any
    features: dict[str, Tensor]


class Projections(nn.Module):
    """Learned 1x1 projections from the student's channels to those of a teacher of another architecture.

    The weights keep the width of the dense student; after pruning, only the columns of the kept channels are used.
    ``state_dict`` leaves the weights out, because they belong to the training and not to the network.

    Args:
        widths: channels of student and teacher at each tap.

    Example:
        >>> project = Projections([(4, 3)])
        >>> project(0, torch.zeros(2, 2, 5, 5), torch.tensor([0, 3])).shape, project.state_dict()
        (torch.Size([2, 3, 5, 5]), OrderedDict())
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(widths):
            weight = nn.Parameter(torch.empty(outputs, inputs))
            nn.init.normal_(weight, std=inputs**-0.5)
            self.register_parameter(f"tap{number}", weight)

    def forward(self, number: int, features: Tensor, kept: Tensor) -> Tensor:
        """Project ``(n, kept channels of the student, ...)`` to ``(n, channels of the teacher, ...)``."""
        weight = self.get_parameter(f"tap{number}").index_select(1, kept)
        return torch.einsum("nc...,dc->nd...", features, weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return None

    def _load_from_state_dict(self, *args: Any) -> None:
        return None


def logits_of(output: Any) -> Tensor:
    """Return the logits in a network's output: the tensor itself, or the entry or attribute that holds it.

    Args:
        output: a tensor, a mapping with the key ``out`` or ``logits``, or an object with an attribute ``logits``.

    Raises:
        TeacherError: the output is something else.
    """
    if isinstance(output, Mapping):
        output = output.get("out", output.get("logits"))
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TeacherError(
            "no tensor of logits in the network's output: pass logits=, a function that returns them"
        )
    return output


@dataclass
class Distiller:
    """Computes the distillation losses of a student.

    Args:
        target: the student's network.
        teacher: the frozen network.
        pairs: taps that are compared.
        flows: positions of the two pairs between which each FSP matrix is computed.
        projections: for a teacher of another architecture; None: the teacher's channels are selected by the
            pruning record.
        temperature: temperature of the losses that have one; None: each loss's usual one.
        kind: type of classification that the logits encode.
        ignore_index: label of the pixels that the losses of logits leave out.
        logits: returns the logits in the output of either network.

    Attributes:
        active: whether forwards of the student are being recorded.
        kept: for each pair, the channels of the student that are left, as indices of the dense student.
    """

    target: nn.Module
    teacher: Teacher
    pairs: list[TapPair]
    flows: list[tuple[int, int]]
    projections: Projections | None = None
    temperature: float | None = None
    kind: Kind = "auto"
    ignore_index: int | None = None
    logits: Callable[[Any], Tensor] = logits_of
    active: bool = field(default=False, init=False)
    kept: list[Tensor] = field(default_factory=list, init=False)
    _calls: list[TapCall] = field(default_factory=list, init=False)
    _features: dict[str, Tensor] = field(default_factory=dict, init=False)
    _handles: list[Any] = field(default_factory=list, init=False)
    _record: PruningRecord | None = field(default=None, init=False)

    def set_record(self, record: PruningRecord | None, device: torch.device) -> None:
        """Compute ``kept`` from what was removed of the student.

        Args:
            record: of the whole network; None: nothing was removed.
            device: where the student is.
        """
        if self.kept and record is self._record and self.kept[0].device == device:
            return
        self._record = record
        removed = record or PruningRecord()
        self.kept = [torch.tensor(pair.student.kept(removed), device=device) for pair in self.pairs]

    def attach(self) -> None:
        """Register the hooks on the student. They record only inside :meth:`recording`."""
        # torch.compile must not trace the hooks: it would keep the features, and their autograd graph, alive.
        store_features = torch.compiler.disable(self._store_features)
        store_call = torch.compiler.disable(self._store_call)
        for pair in self.pairs:
            tapped = self.target.get_submodule(pair.student.name)
            self._handles.append(tapped.register_forward_hook(partial(store_features, pair.student.name)))
        self._handles.append(self.target.register_forward_hook(store_call, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks and the recorded features."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._features = [], [], {}

    @contextmanager
    def recording(self) -> Iterator[list[TapCall]]:
        """Record the student's forwards inside the block into the list that it yields."""
        self.active, self._calls, self._features = True, [], {}
        try:
            yield self._calls
        finally:
            self.active, self._calls, self._features = False, [], {}

    def losses(
        self, calls: Sequence[TapCall], labels: Tensor | None, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Return each named loss, as mean over the student's forwards.

        Args:
            calls: the student's forwards of one step.
            labels: class numbers, for ``ignore_index``.
            names: any of ``LOSSES``.
        """
        losses = [self._call_losses(call, labels, names) for call in calls]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in LOSSES if name in names}

    def _store_features(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.active:
            self._features[name] = out

    def _store_call(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.active:
            self._calls.append(TapCall((args, kwargs), out, self._features))
            self._features = {}

    def _call_losses(self, call: TapCall, labels: Tensor | None, names: Collection[str]) -> dict[str, Tensor]:
        """Run the teacher on the inputs of one forward and return the named losses, unscaled by their weights."""
        pairs = self.pairs if set(FEATURE_LOSSES) & set(names) else []
        student = [pair.student.channels_first(call.features[pair.student.name]) for pair in pairs]
        with torch.autocast(self.kept[0].device.type if self.kept else "cpu", enabled=False):
            output, features = self.teacher.run(call.example, [pair.teacher.name for pair in pairs])
            teacher = [pair.teacher.channels_first(features[pair.teacher.name]) for pair in pairs]
            losses = self._logit_losses(call.output, output, labels, names)
            if "attention" in names:
                losses["attention"] = self._attention(student, teacher)
            if "fsp" in names:
                losses["fsp"] = self._fsp(student, teacher)
            if "cwd_features" in names:
                losses["cwd_features"] = self._cwd_features(student, teacher)
        return losses

    # The teacher's tensors were made in inference mode, and autograd may not save such tensors. Each loss first
    # reduces them to new, small ones under no_grad: logits, one map per tap, one matrix per pair of taps.

    def _logit_losses(
        self, student: Any, teacher: Any, labels: Tensor | None, names: Collection[str]
    ) -> dict[str, Tensor]:
        wanted = [name for name in LOGIT_LOSSES if name in names]
        if not wanted:
            return {}
        ours = self.logits(student)
        with torch.no_grad():
            theirs = self.logits(teacher).clone()
        return {name: LOGIT_LOSSES[name](ours, theirs, **self._options(name, labels)) for name in wanted}

    def _options(self, name: str, labels: Tensor | None) -> dict[str, Any]:
        """Return the arguments of a loss of logits besides the logits."""
        options = {"target": labels, "ignore_index": self.ignore_index, **self._heat()}
        return {**options, "kind": self.kind} if name in KIND_LOSSES else options

    def _heat(self) -> dict[str, Any]:
        """Return the argument ``temperature``, if it is not left to the loss."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def _attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        sizes = [common_size(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        with torch.no_grad():
            targets = list(map(attention_map, teacher, sizes))
        return _sum(map(mean_square, map(attention_map, student, sizes), targets))

    def _fsp(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = self._flows(self._select_kept(teacher))
        return _sum(map(mean_square, self._flows(self._project(student)), targets))

    def _cwd_features(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        sizes = [common_size(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        with torch.no_grad():
            targets = [x.clone() for x in map(pool, self._select_kept(teacher), sizes)]
        features = map(pool, self._project(student), sizes)
        return _sum(map(partial(cwd, **self._heat()), features, targets))

    def _flows(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [flow(features[one], features[other]) for one, other in self.flows]

    def _select_kept(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Select the teacher's channels that are left in the student, unless the student is projected."""
        if self.projections is not None:
            return list(features)
        return [
            x if x.shape[1] == len(kept) else x.index_select(1, kept)
            for x, kept in zip(features, self.kept, strict=True)
        ]

    def _project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the student's features to the teacher's channels, if there are projections."""
        for pair, x, kept in zip(self.pairs, features, self.kept, strict=True):
            if x.shape[1] != len(kept):
                raise TeacherError(
                    f"the student has {x.shape[1]} channels at {pair.student.name!r}, its record says {len(kept)}: "
                    "pass record= of a student that was pruned before"
                )
        if self.projections is None:
            return list(features)
        return [
            self.projections(n, x, kept) for n, (x, kept) in enumerate(zip(features, self.kept, strict=True))
        ]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of scalar tensors."""
    return torch.stack(list(terms)).sum()
