"""Repair of networks with sizes that depend on values: the layers before these are repaired, and judge the repair."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_prune import trace
from lightning_prune.compensation import collect_targets, cut_and_compensate_
from lightning_prune.compensation.value_watch import ValueWatch
from lightning_prune.utils.example_inputs import first_images, num_samples
from tests.support.detectors import collate, detector, scenes
from tests.support.nets import Net

BEHIND_VALUES = "the number of its inputs depends on values"


def test_boxes_of_a_repaired_detector_are_those_of_the_dense_one():
    net = detector("faster").eval()
    with torch.no_grad():  # filters that others can replace without a loss
        for tensor in (net.backbone[0].weight, net.backbone[0].bias):
            tensor[8:] = 2 * tensor[:8]
        net.roi_heads.box_head.fc6.weight[0].zero_()
    dense, samples = copy.deepcopy(net), scenes(8)
    images, targets = collate(samples)
    graph = trace(net, images[:1], targets[:1])
    batches = [collate(samples[:5]), collate(samples[5:])]
    report = cut_and_compensate_(net, graph, graph.layers["backbone.0.weight"][8:], batches)[1]
    assert report.accepted
    assert report.change_before > 0.05
    assert report.change_after < 1e-6
    assert report.left_alone["roi_heads.box_head.fc6"] == BEHIND_VALUES
    for small, expected in zip(net(images), dense(images), strict=True):
        torch.testing.assert_close(small["scores"], expected["scores"], rtol=0, atol=1e-3)
        torch.testing.assert_close(small["boxes"], expected["boxes"], rtol=0, atol=0.1)


def test_last_layers_before_sizes_that_depend_on_values_judge():
    batches = [collate(scenes(4))]
    targets = collect_targets(detector("faster").eval(), {}, batches)
    assert set(targets.judges) == {("rpn.head.cls_logits", 0), ("rpn.head.bbox_pred", 0), ("backbone.4", 0)}
    assert targets.outputs == []
    assert targets.num_images == 4


def chosen_rows(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Return a fixed number of outputs, to which one layer adds for chosen rows only."""
    h = net.a(x).relu()
    chosen = h.sum(1) > h.sum(1).median() - 1  # as many rows as there are, but not for other weights
    return net.c(h).index_add(0, chosen.nonzero()[:, 0], net.b(h[chosen]))


def test_rows_that_values_choose_are_not_fitted_and_the_outputs_judge():
    net = Net(chosen_rows, a=nn.Linear(4, 12), b=nn.Linear(12, 3), c=nn.Linear(12, 3))
    targets = collect_targets(net, {}, [torch.randn(16, 4)])
    assert targets.left_alone == {"b": BEHIND_VALUES}
    assert set(targets.calls) == {"a", "c"}
    assert [tuple(output.shape) for output in targets.outputs] == [(16, 3)]
    assert targets.judges == []


def test_sum_with_chosen_rows_has_the_size_of_its_fixed_operand():
    with ValueWatch() as watch:
        fixed = torch.zeros(5)
        chosen = fixed[fixed == 0]
        added, both = fixed + chosen, chosen * 2
        written = torch.zeros(5).index_add(0, torch.arange(5)[fixed == 0], chosen)
    assert [watch.has_value_size(x) for x in (chosen, added, both, written)] == [True, False, True, False]


def test_first_images_of_lists_and_tensors():
    images, targets = first_images(collate(scenes(4)), 4, 3)
    assert (len(images), len(targets), num_samples(((images, targets), {}))) == (3, 3, 3)
    assert first_images([torch.zeros(4, 2), torch.zeros(4)], 4, 3)[0].shape == (3, 2)
