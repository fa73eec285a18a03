"""Mutation tests of the proof: faults are planted in the rules and in surgery, and every wrong cut must be refused.

A planted rule is wrong in both traces, as a real mistake would be. Each network is cut at random without the proof,
and compared with oracles that were made without the fault. The cuts that are wrong must be refused by the proof, and
leave everything unchanged. A fault that makes no cut wrong fails its test, because it tests nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelGraph
from lightning_prune.surgery import prune as surgery
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Tie
from lightning_prune.tracing.rules import contractions, reshape
from lightning_prune.tracing.rules.registry import same_labels
from lightning_prune.tracing.tracker import Labels, Tracker
from lightning_prune.utils.modules import cut
from tests.support.mutation_networks import (
    BUILTIN,
    CHUNKED_CAT,
    DEPTHWISE,
    FLAT,
    FLIPPED,
    FOREIGN,
    GATED,
    GLU,
    GROUPED,
    HALVES,
    IN_GROUPS,
    LAST,
    LAYERED,
    LISTED,
    MASKED,
    NORMED,
    NUMBERED,
    PADDED,
    PICKED,
    PILED,
    PIXELS,
    PLAIN,
    PRELU,
    REPEATED,
    RESIDUAL,
    ROLLED,
    SHUFFLED,
    SLICED,
    SQUARE,
    STACKED,
    THREE,
    TWO,
    UNFOLDED,
    UNPIXELS,
    UP,
    UP_GROUPED,
    WOVEN,
    attention,
    shared_weights,
)
from tests.support.mutation_trials import Fault, check_caught, check_right
from tests.support.mutations import (
    along,
    flipped,
    patched,
    relabelled,
    replaced,
    retied,
    rolled,
    tiled,
    unpinned,
    untied,
    unused,
    wrapped,
)

aten = torch.ops.aten


# -- the faults ---------------------------------------------------------------------------------------------


def _offset_ignored(call: OperatorCall, labels: Labels) -> Sequence[Sequence[Ids]]:
    lengths = [tensor.shape[1] for tensor in call.args[0]]
    return along(1, lambda ids: torch.cat([ids[:n] for n in lengths]))(call, labels)


def _order_swapped(call: OperatorCall, labels: Labels) -> Sequence[Sequence[Ids]]:
    lengths = [tensor.shape[1] for tensor in call.args[0]]
    return along(1, lambda ids: torch.cat(ids.split(lengths)[::-1]))(call, labels)


def _inverse_permutation(call: OperatorCall, tracker: Tracker) -> None:
    labels, dims = tracker.labels(call.args[0]), list(call.args[1])
    tracker.label(call.out, [labels[dims.index(d)] for d in range(len(dims))])


def _pieces_swapped(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    right()
    labels = [tracker.labels(out) for out in call.outputs]
    for out, other in zip(call.outputs, labels[::-1], strict=True):
        tracker.label(out, other)


def _wrong_stride(across: Any) -> Any:
    return lambda ids, groups, tracker: (
        None if ids is None else across(ids.view(-1, groups).t().flatten(), groups, tracker)
    )


def _no_groups(across: Any) -> Any:
    return lambda ids, groups, tracker: None if ids is None else ids[: len(ids) // groups]


def _groups_interleaved(call: OperatorCall, labels: Labels) -> Sequence[Sequence[Ids]]:
    return along(1, tiled(3))(call, labels) if call.args[6] else labels


def _forgotten(call: OperatorCall, tracker: Tracker) -> None:
    tracker.label(call.out, [() for _ in call.out.shape])


def _one_further(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    right()
    tracker.label(call.out, along(1, rolled)(call, tracker.labels(call.out)))


def _not_foreign(foreign: Any) -> Any:
    """Let the dimension shrink independently of the tensor whose size was passed."""

    def wrong(grid: Tensor, dim: int, passed: Any, tracker: Tracker) -> Ids | None:
        ids = foreign(grid, dim, passed, tracker)
        return None if ids is None else grid.flatten()[: grid.shape[dim]].clone()

    return wrong


def _one_filter_each(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    made = len(tracker.ties.ties)
    right()
    source, weight, groups = call.args[0], call.args[1], call.args[8]
    out = tracker.along(weight, 0)
    if weight.shape[1] == 1 and out is not None:
        del tracker.ties.ties[made:]
        tracker.tie(tracker.along(source, 1), out[:groups])
        tracker.tie(tracker.along(call.args[2], 0), out)


def _in_and_out_swapped(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    made = len(tracker.ties.ties)
    right()
    source, weight, bias = call.args[:3]
    out = tracker.along(weight, 0)
    if call.args[6] and out is not None:
        del tracker.ties.ties[made:]
        tracker.tie(tracker.along(source, 1), tracker.along(weight, 1))
        tracker.tie(tracker.along(bias, 0), out)
        tracker.label(call.out, [(), (out,), (), ()])


def _no_bias(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    right()
    bias = tracker.along(call.args[2], 0) if call.args[2] is not None else None
    tracker.ties.ties[:] = [tie for tie in tracker.ties.ties if tie.left is not bias]


def _from_the_left(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    """Tie a scale of channels to the wrong dimension."""
    made = len(tracker.ties.ties)
    right()
    if min(tensor.dim() for tensor in call.tensors) == 3:
        del tracker.ties.ties[made:]
        tracker.label(call.out, tracker.labels(call.args[0]))


def _flat_swapped(call: OperatorCall, labels: Labels) -> Sequence[Sequence[Ids]]:
    return along(-1, tiled(4))(call, labels) if call.out.dim() == 2 else labels


def _no_heads(tie: Tie) -> bool:
    return len(tie.left) == 3


def _heads_across(choose: Any) -> Any:
    """Ids of a head's channels where those of heads belong."""

    def spread(ids: Ids, dim: int, shape: list[int], new_shape: list[int]) -> Tensor:
        grid = choose(ids, dim, shape, new_shape)
        return grid.transpose(-2, -1).contiguous() if new_shape == [3, 3] else grid

    return spread


def _stacked_as_concatenated(call: OperatorCall, labels: Labels) -> Sequence[Sequence[Ids]]:
    return [labels[0], labels[2], (), *labels[3:]]


def _no_cut_of_buffers(indices: Any) -> Any:
    def wrong(graph: ChannelGraph, kept: Any) -> Any:
        return {name: dims for name, dims in indices(graph, kept).items() if "running" not in name}

    return wrong


def _shifted(indices: Any) -> Any:
    def wrong(graph: ChannelGraph, kept: Any) -> Any:
        shifted = indices(graph, kept)
        name = "a.weight"
        size = len(graph.bindings[name][0])
        if 0 in shifted.get(name, {}):
            shifted[name][0] = sorted((i + 1) % size for i in shifted[name][0])
        return shifted

    return wrong


def _other_dimension(indices: Any) -> Any:
    def wrong(graph: ChannelGraph, kept: Any) -> Any:
        swapped = indices(graph, kept)
        for name in ("b.weight",):
            if name in swapped:
                swapped[name] = {1 - dim: index for dim, index in swapped[name].items()}
        return swapped

    return wrong


def _twice(named: Any) -> Any:
    def wrong(model: nn.Module) -> Any:
        return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    return wrong


def _cut_twice(right: Any) -> Any:
    def wrong(tensors: Any, indices: Any, optimizers: Any) -> None:
        right(tensors, indices, optimizers)
        for name in ("b.weight",):
            for dim, index in indices.get(name, {}).items():
                again = [i for i in index if i < tensors[name].shape[dim]]
                tensors[name].data = cut(tensors[name], {dim: again})

    return wrong


def _wrong_tensor(right: Any) -> Any:
    """Cut the tensors at other indices than the ids."""

    def wrong(tensors: Any, indices: Any, optimizers: Any) -> None:
        turned = {
            n: {
                d: sorted(tensors[n].shape[d] - 1 - i for i in at) if n == "a.weight" else at
                for d, at in dims.items()
            }
            for n, dims in indices.items()
        }
        right(tensors, turned, optimizers)

    return wrong


def _retiled(call: OperatorCall, tracker: Tracker) -> None:
    """Pixel shuffle, with the channels of a pixel a stride apart."""
    ids = tracker.along(call.args[0], 1)
    first = tracker.tie_across(ids.view(4, -1)) if ids is not None else None
    tracker.label(call.out, [(), (first,) if first is not None else (), (), ()])


def _unmoved(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
    """Leave the ids in their places, in dimensions of the new sizes."""
    labels = tracker.labels(call.args[0])
    right()
    if call.out.dim() == 5 and call.out.shape[1] == call.out.shape[2]:
        tracker.label(call.out, labels)


def _paired(call: OperatorCall, tracker: Tracker) -> None:
    ids = tracker.along(call.args[0], 1)
    first = tracker.tie_across(ids.view(-1, 2).t()) if ids is not None else None
    tracker.label(call.out, [(), (first.contiguous(),) if first is not None else (), (), ()])


def _first_four(call: OperatorCall, tracker: Tracker) -> None:
    """Treat the index as if it were a range."""
    ids = tracker.along(call.args[0], 1)
    tracker.label(call.out, [(), (ids[:4],) if ids is not None else (), (), ()])


FAULTS = [
    Fault("concat offset ignored", TWO, relabelled(aten.cat, change=_offset_ignored)),
    Fault("concat order swapped", THREE, relabelled(aten.cat, change=_order_swapped)),
    Fault("concat order swapped, equal parts", TWO, relabelled(aten.cat, change=_order_swapped)),
    Fault(
        "groups counted with the wrong stride", GROUPED, patched(contractions, "_tie_groups", _wrong_stride)
    ),
    Fault("groups not tied", GROUPED, patched(contractions, "_tie_groups", _no_groups)),
    Fault("depthwise multiplier ignored", DEPTHWISE, wrapped(aten.convolution, by=_one_filter_each)),
    Fault(
        "transposed convolution: in and out swapped", UP, wrapped(aten.convolution, by=_in_and_out_swapped)
    ),
    Fault(
        "transposed convolution: groups interleaved",
        UP_GROUPED,
        relabelled(aten.convolution, change=_groups_interleaved),
    ),
    Fault("permute with inverse dimensions", LAST, replaced(aten.permute, by=_inverse_permutation)),
    Fault("transpose ignored", SQUARE, replaced(aten.transpose, by=_forgotten)),
    Fault("weight of a product not transposed", SQUARE, replaced(aten.t, by=same_labels)),
    Fault("slice offset off by one", HALVES, wrapped(aten.slice, by=_one_further)),
    Fault("slice at a number not pinned", NUMBERED, unpinned(aten.slice)),
    Fault("slice at an attribute not followed", SLICED, unused(aten.slice)),
    Fault("split parts not tied, concatenated", CHUNKED_CAT, untied(aten.split)),
    Fault("split parts swapped", LISTED, wrapped(aten.split, aten.split_with_sizes, by=_pieces_swapped)),
    Fault(
        "flatten with channels and pixels swapped",
        FLAT,
        relabelled(aten.view, aten._unsafe_view, change=_flat_swapped),
    ),
    Fault("pixel shuffle tiled instead of repeated", PIXELS, replaced(aten.pixel_shuffle, by=_retiled)),
    Fault(
        "pixel unshuffle tiled instead of repeated",
        UNPIXELS,
        relabelled(aten.pixel_unshuffle, change=along(1, lambda ids: ids[::4].repeat(4))),
    ),
    Fault(
        "unfold tiled instead of repeated",
        UNFOLDED,
        relabelled(aten.im2col, change=along(1, lambda ids: ids[::9].repeat(9))),
    ),
    Fault("flip ignored", FLIPPED, replaced(aten.flip, by=same_labels)),
    Fault(
        "channel shuffle ignored",
        BUILTIN,
        replaced(aten.channel_shuffle, aten.native_channel_shuffle, by=same_labels),
    ),
    Fault("shuffle by views: transpose ignored", SHUFFLED, wrapped(aten.transpose, by=_unmoved)),
    Fault(
        "batch norm not tied",
        NORMED,
        untied(
            aten.native_batch_norm,
            aten._native_batch_norm_legit,
            aten._native_batch_norm_legit_no_training,
            aten.cudnn_batch_norm,
            aten._batch_norm_with_update,
        ),
    ),
    Fault(
        "batch norm tied in reverse",
        NORMED,
        retied(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, change=flipped),
    ),
    Fault("bias not tied", PLAIN, wrapped(aten.convolution, by=_no_bias)),
    Fault("residual not tied", RESIDUAL, untied(aten.add)),
    Fault("residual tied in reverse", RESIDUAL, retied(aten.add, change=flipped)),
    Fault("broadcast from the wrong side", GATED, wrapped(aten.mul, by=_from_the_left)),
    Fault("loose scale not tied", GATED, untied(aten.mul)),
    Fault(
        "attention: heads not tied",
        attention(True, free=True),
        untied(
            aten.scaled_dot_product_attention,
            aten._scaled_dot_product_flash_attention_for_cpu,
            only=_no_heads,
        ),
    ),
    Fault(
        "attention: heads tied along a head's channels, fused",
        attention(True),
        patched(reshape, "_reshaped_ids", _heads_across),
    ),
    Fault(
        "attention: heads tied along a head's channels, by hand",
        attention(False),
        patched(reshape, "_reshaped_ids", _heads_across),
    ),
    Fault("attention: number of heads not followed", attention(True), unused(aten.view, aten._unsafe_view)),
    Fault("foreign size ignored", FOREIGN, patched(reshape, "foreign_ids", _not_foreign)),
    Fault("stack not tied", STACKED, untied(aten.stack)),
    Fault("stack not tied, woven", WOVEN, untied(aten.stack)),
    Fault("stack treated as concat", PILED, relabelled(aten.stack, change=_stacked_as_concatenated)),
    Fault("roll ignored", ROLLED, unpinned(aten.roll)),
    Fault(
        "repeat interleaved",
        REPEATED,
        relabelled(aten.repeat, change=along(1, lambda ids: ids[:6].repeat_interleave(2))),
    ),
    Fault("glu halves as pairs", GLU, replaced(aten.glu, by=_paired)),
    Fault("prelu not tied", PRELU, untied(aten._prelu_kernel, aten.prelu)),
    Fault(
        "padding on the other side",
        PADDED,
        relabelled(aten.constant_pad_nd, change=along(1, lambda ids: ids.roll(-1))),
    ),
    Fault("index not pinned", PICKED, replaced(aten.index, by=_first_four)),
    Fault("linear reads in reverse", SQUARE, retied(aten.addmm, aten.mm, aten.bmm, change=flipped)),
    Fault("convolution reads in reverse", PLAIN, retied(aten.convolution, change=flipped)),
    Fault("layer norm tied in reverse", LAYERED, retied(aten.native_layer_norm, change=flipped), mixing=True),
    Fault("layer norm not tied", LAYERED, untied(aten.native_layer_norm), mixing=True),
    Fault(
        "group norm tied in reverse",
        IN_GROUPS,
        retied(aten.native_group_norm, aten.group_norm, change=flipped),
        mixing=True,
    ),
    Fault(
        "instance norm not tied",
        MASKED,
        untied(aten.repeat, aten.native_batch_norm, aten._native_batch_norm_legit),
    ),
    Fault(
        "output not pinned",
        PLAIN,
        patched(Tracker, "pin_all", lambda right: lambda self, tensors, reason: None),
    ),
    Fault(
        "attribute not set by surgery",
        SLICED,
        patched(surgery, "set_attribute", lambda f: lambda attribute, value: None),
    ),
    Fault(
        "attribute set wrong by surgery",
        SLICED,
        patched(surgery, "set_attribute", lambda f: lambda attribute, value: f(attribute, value - 1)),
    ),
    Fault("buffer not cut", NORMED, patched(surgery, "surviving_indices", _no_cut_of_buffers)),
    Fault("index list shifted by one", PLAIN, patched(surgery, "surviving_indices", _shifted)),
    Fault("cut of the wrong dimension", PLAIN, patched(surgery, "surviving_indices", _other_dimension)),
    Fault("tensor cut elsewhere than its ids", PLAIN, patched(surgery, "_cut_", _wrong_tensor)),
    Fault("shared parameter cut twice", shared_weights, patched(surgery, "_cut_", _cut_twice)),
]


MISSED: dict[str, str] = {}  # fault -> why the proof cannot see it; there is none


def _cases() -> list[Any]:
    return [
        pytest.param(
            fault,
            id=str(fault),
            marks=[pytest.mark.xfail(reason=MISSED[fault.name], strict=True)] if fault.name in MISSED else [],
        )
        for fault in FAULTS
    ]


# -- the tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", _cases())
def test_every_wrong_cut_is_refused_and_rolled_back(fault: Fault) -> None:
    check_caught(fault)


@pytest.mark.parametrize("build", list(dict.fromkeys(fault.build for fault in FAULTS)))
def test_without_a_fault_every_cut_is_right(build: Callable[[], nn.Module]) -> None:
    check_right(build)
