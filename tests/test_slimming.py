"""Slimming: the penalty is what the loss term's gradient would be, and what it made superfluous goes, cleanly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from segmentation_models_pytorch import Unet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import kill
from benchmarks.kill import Classifier, same, shuffled
from lightning_prune import (
    PruningRecord,
    RecordError,
    SlimmingCallback,
    SurgeryError,
    load_pruned,
    prune_,
    save_pruned,
    trace,
)
from lightning_prune.best import competes
from lightning_prune.criteria.scores import norm_scales
from lightning_prune.folding import Folded, Measured, outputs, relative_change
from lightning_prune.limits import DenseSizes, Limits
from lightning_prune.networks import AtomMobile
from lightning_prune.penalty import Penalty, channel_costs, slimmable
from lightning_prune.resources import LayerCost
from lightning_prune.shrinking import ShrinkRules, scale_sizes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|LeafSpec|logging interval)"),
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|exists and is not empty|not met)"),
]


class Small(L.LightningModule):
    """A classifier that can hold the penalty in its own loss, as a slimmer without this callback would write it."""

    def __init__(self, rho: float = 0.0, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 4),
        )
        self.rho, self.optimizer = rho, optimizer
        self.grads: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.rho:
            graph = trace(self.net, torch.zeros(1, 1, 12, 12))
            p = channel_costs(graph, slimmable(graph, self.net))
            loss = loss + self.rho * sum(
                (torch.tensor(p[name]) * self.net.get_parameter(name).abs()).sum() for name in p
            )
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append([p.grad.clone() for p in self.net.parameters() if p.grad is not None])

    def configure_optimizers(self) -> Any:
        return (self.optimizer or (lambda p: torch.optim.AdamW(p, 1e-2)))(self.parameters())


def loader(number: int = 32, batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(number) % 4
    return DataLoader(
        TensorDataset(torch.randn(number, 1, 12, 12, generator=generator) + y[:, None, None, None], y), batch
    )


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet, **options)
    trainer.fit(module, loader())
    return trainer


def slimming(**options: Any) -> SlimmingCallback:
    return SlimmingCallback(**{"verbose": False, "submodule": "net", **options})


def scaled(net: nn.Module, size: float, every: int = 2) -> nn.Module:
    """Every other scale of every norm is ``size``, shifts are random."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data[::every] = size
            module.bias.data = torch.randn(module.bias.shape, generator=generator)
            module.running_mean = torch.randn(module.bias.shape, generator=generator)
            module.running_var = torch.rand(module.bias.shape, generator=generator) + 0.5
    return net.eval()


# -- the penalty -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_the_penalty_is_autograd_s_gradient_of_the_written_loss_term(options: dict[str, Any]) -> None:
    """And so are all weights after training with it: accumulated, clipped and stepped alike."""
    written, added, plain = (Small(rho, lambda p: torch.optim.SGD(p, 0.1)) for rho in (0.03, 0.0, 0.0))
    fit(written, **options)
    fit(added, slimming(rho=0.03, end_epoch=9), **options)
    assert len(written.grads) == len(added.grads) == 8 // options.get("accumulate_grad_batches", 1)
    for ours, theirs in zip(added.grads[0], written.grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    tolerance = 1e-2 if "precision" in options else 1e-4  # sums of bfloat16 round otherwise
    torch.testing.assert_close(
        added.net.state_dict(), written.net.state_dict(), rtol=tolerance, atol=tolerance
    )
    fit(plain, **options)
    assert not torch.allclose(plain.net[1].weight, added.net[1].weight, atol=1e-3)


def test_costs_are_multiples_of_the_mean_as_in_atomnas() -> None:
    net = Small().net
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    scales = slimmable(graph, net)
    first, second = 144 * 9 + 36 * 9 * 12, 36 * 9 * 8 + 4  # MACs of a filter, with those of who reads it
    mean = (8 * first + 12 * second) / 20
    costs = channel_costs(graph, scales)
    np.testing.assert_allclose(costs["1.weight"], first / mean)
    np.testing.assert_allclose(costs["4.weight"], second / mean)
    assert channel_costs(graph, scales, "params")["1.weight"][0] != pytest.approx(first / mean)
    with pytest.raises(ValueError, match="unknown resource 'seconds'; this graph knows macs, params"):
        channel_costs(graph, scales, "seconds")


def test_any_resource_pushes_and_never_the_other_way() -> None:
    """Of the first layer's channels each costs one more, of the second's each costs one less than nothing."""
    energy = LayerCost(lambda layer, ins, outs: {"net.0": outs, "net.3": 100 - outs}.get(layer, 1))
    callback = slimming(rho=0.05, by="energy", resources={"energy": energy}, submodule=None, end_epoch=9)
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.1))
    fit(module, callback, limit_train_batches=1)
    plain = Small(optimizer=lambda p: torch.optim.SGD(p, 0.1))
    fit(plain, limit_train_batches=1)
    pushed = plain.net[1].weight - module.net[1].weight
    torch.testing.assert_close(
        pushed, torch.full((8,), 0.1 * 0.05 * 20 / 8)
    )  # 8 of 20 channels cost something
    assert torch.equal(module.net[4].weight, plain.net[4].weight)


def test_a_stream_s_scales_share_its_cost() -> None:
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    scales = slimmable(graph, net)
    costs = channel_costs(graph, scales)
    unit = graph.layers["encoder.layer1.0.conv2.weight"][0]
    shared = [name for name, units in scales.items() if unit in units]
    assert len(shared) == 3  # the stem's, and those of two blocks
    alone = graph.cost("macs") - graph.cost("macs", [unit])
    other = graph.layers["encoder.layer1.0.conv1.weight"][0]
    ratio = costs[shared[0]][0] / costs["encoder.layer1.0.bn1.weight"][0]
    assert ratio == pytest.approx(alone / 3 / (graph.cost("macs") - graph.cost("macs", [other])))


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scale_the_penalty_is_not_scaled_down(fused: bool) -> None:
    """Fused optimizers unscale gradients themselves, after the hook: there the penalty is scaled like the loss."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, fused=fused)

    written, added = Small(0.03, optimizer), Small(0.0, optimizer)
    for module, callbacks in ((written, []), (added, [slimming(rho=0.03, end_epoch=9)])):
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        plugin.precision = "16-mixed"
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        fit(module, *callbacks, plugins=[plugin], limit_train_batches=3)
    torch.testing.assert_close(added.net.state_dict(), written.net.state_dict(), rtol=1e-4, atol=1e-5)


def test_rho_rises_by_steps_or_epochs() -> None:
    class Rhos(L.Callback):
        def __init__(self, of: SlimmingCallback) -> None:
            self.of, self.seen = of, []

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            self.seen.append(self.of._rho(trainer) / self.of.rho)

    for options, expected in (
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, *[1] * 13]),
        ({"warmup_epochs": 1}, [*[n / 8 for n in range(1, 9)], *[1] * 8]),
        ({}, [1] * 16),
    ):
        callback = slimming(rho=0.2, end_epoch=9, **options)
        rhos = Rhos(callback)
        fit(Small(), callback, rhos, epochs=2)
        assert rhos.seen == pytest.approx(expected)


# -- what goes -------------------------------------------------------------------------------------------------


def test_a_unit_stays_while_any_of_its_scales_is_large_in_model_or_average() -> None:
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    scales = slimmable(graph, net, norms=["encoder.*"])
    gammas = {name: torch.zeros(len(units)) for name, units in scales.items()}
    averaged = {name: value.clone() for name, value in gammas.items()}
    gammas["encoder.bn1.weight"][3] = -0.5
    averaged["encoder.layer1.1.bn2.weight"][5] = 0.25
    sizes = scale_sizes(graph, scales, [gammas, averaged])
    stream = graph.layers["encoder.layer1.0.conv2.weight"]
    assert sizes[stream[[3, 5]]].tolist() == [0.5, 0.25]
    assert not sizes[np.delete(stream, [3, 5])].any()
    decoder = graph.layers["decoder.blocks.0.conv1.0.weight"]
    assert np.isinf(sizes[decoder]).all()
    plan = ShrinkRules({}, limits=Limits(1.0)).plan(graph, sizes, DenseSizes.of(graph))
    assert not np.isin(stream[[3, 5]], plan.remove).any()
    assert np.isin(np.delete(stream, [3, 5]), plan.remove).all()
    assert (
        scale_sizes(graph, scales, [averaged])[stream[3]] == 0
    )  # in the last epoch the average alone decides


def test_shrinks_when_the_masked_share_is_reached_and_ends_with_the_budget() -> None:
    callback = slimming(budget={"macs": 0.5}, rho=0.3, threshold=0.1, shrink_at=0.1, end_epoch=7)
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.05))
    fit(module, callback, epochs=9)
    early = [cut for cut in callback.history if cut.epoch < 7]
    assert early  # some were cut on the way
    shares = [1.0, *(cut.share["macs"] for cut in callback.history)]
    assert all(before - after >= 0.1 for before, after in pairwise(shares[: len(early) + 1]))
    assert shares[-1] <= 0.5
    assert callback.history[-1].stopped == "budget"
    assert callback.finished
    assert len(callback.changes) == len(callback.folded) == len(callback.history)


def test_without_a_budget_the_threshold_says_all() -> None:
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    scaled(module.net, 1e-4).train()
    callback = slimming(rho=0.0, shrink_at=1.0)
    fit(module, callback, epochs=2)
    assert [cut.epoch for cut in callback.history] == [1]
    assert (module.net[1].num_features, module.net[4].num_features) == (4, 6)
    assert callback.changes[0] < 0.05  # zero padding lets a little through


def test_the_final_cut_meets_the_budget_by_the_smallest_scales() -> None:
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    module.net[1].weight.data = torch.arange(1.0, 9) + 20
    module.net[4].weight.data = torch.arange(1.0, 13)
    callback = slimming(budget={"macs": 0.6}, rho=0.0, end_epoch=0)
    fit(module, callback, epochs=2)
    kept = callback.record.kept["4.weight"][0]
    assert kept == list(range(12 - len(kept), 12))
    graph = trace(Small().net, torch.zeros(1, 1, 12, 12))
    dense, each = graph.cost("macs"), 36 * 9 * 8 + 4
    assert 12 - len(kept) == int(np.ceil(0.4 * dense / each))  # not one more than the budget asks


@pytest.mark.parametrize("budget", [{"macs": 0.6}, None])
def test_only_what_is_shrunk_to_its_end_competes_for_the_best_checkpoint(
    budget: dict[str, float] | None,
) -> None:
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append((competes(trainer), callback.finished))

    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    module.net[4].weight.data[:4] = 0
    callback = slimming(budget=budget, rho=0.0, shrink_at=1.0, end_epoch=1)
    fit(module, callback, Watch(), epochs=3, limit_train_batches=1)
    assert seen == [(False, False), (False, True), (True, True)]


# -- folding ---------------------------------------------------------------------------------------------------


def cut_and_fold(net: nn.Module, example: Tensor, silent: float = 0.0) -> tuple[Folded, float, float]:
    """What was folded, and how much the outputs changed with folding and without."""
    graph = trace(net, example)
    scales = slimmable(graph, net)
    gammas = {name: net.get_parameter(name) for name in scales}
    sizes = scale_sizes(graph, scales, [gammas])
    remove = (
        ShrinkRules({}, limits=Limits(1.0), threshold=silent).plan(graph, sizes, DenseSizes.of(graph)).remove
    )
    measured = Measured([net], graph, scales, remove, ((example,), {}))
    dropped = copy.deepcopy(net)
    prune_(dropped, trace(dropped, example), remove)
    prune_(net, graph, remove)
    assert len(remove)
    unfolded = relative_change(measured.before, outputs(dropped, ((example,), {})))
    return measured.fold_(remove), measured.change(), unfolded


def exact_nets() -> dict[str, nn.Module]:
    def after(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), *layers)

    return {
        "one element": after(nn.Conv2d(8, 3, 1)),
        "no padding": after(nn.Conv2d(8, 3, 3)),
        "reflected": after(nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")),
        "into the running mean": after(nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3)),
        "flattened": after(nn.Flatten(), nn.Linear(8 * 64, 3)),
        "transposed": after(nn.ConvTranspose2d(8, 3, 2, stride=1), nn.AdaptiveAvgPool2d(1)),
        "depthwise between": after(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 3, 1, bias=False),
            nn.BatchNorm2d(3),
        ),
    }


@pytest.mark.parametrize("name", exact_nets())
def test_a_removed_shift_is_folded_exactly(name: str) -> None:
    net = scaled(exact_nets()[name], 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert unfolded > 1e-2  # what dropping it does
    if name == "transposed":  # its border sees fewer elements
        assert folded == Folded(nearly=1)
    else:
        assert change < 1e-5
        assert folded == Folded(exact=1)


def test_behind_zero_padding_the_mean_is_folded_and_the_rest_reported() -> None:
    net = scaled(nn.Sequential(*exact_nets()["one element"][:3], nn.Conv2d(8, 3, 3, padding=1)), 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(nearly=1)
    assert 1e-4 < change < unfolded


def test_without_bias_and_norm_nothing_takes_the_shift() -> None:
    net = scaled(nn.Sequential(*exact_nets()["one element"][:3], nn.Conv2d(8, 3, 1, bias=False)), 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(lost=1)
    assert change == unfolded > 1e-2


def test_measuring_leaves_the_network_as_it_was() -> None:
    net = scaled(exact_nets()["depthwise between"], 1e-4)
    before = copy.deepcopy(net.state_dict())
    example = torch.randn(2, 1, 8, 8)
    graph = trace(net, example)
    scales = slimmable(graph, net)
    Measured([net], graph, scales, graph.layers["0.weight"][:3], ((example,), {}))
    assert same(net.state_dict(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# -- inside a trainer ------------------------------------------------------------------------------------------


def test_a_moving_average_guards_the_mask_and_is_cut_and_folded_along() -> None:
    """The model's scales are at 0, those of the average are not there yet."""
    averaging = EMAWeightAveraging(decay=0.5)
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    callback = slimming(rho=0.0, threshold=0.1, shrink_at=0.01)

    class Zero(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Small, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net[4].weight[:6] = 0

    fit(module, callback, averaging, Zero(), epochs=1, limit_train_batches=2)
    assert not callback.history  # 0.5 in the average
    module = Small(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    callback, averaging = slimming(rho=0.0, threshold=0.1, shrink_at=0.01), EMAWeightAveraging(decay=0.5)
    fit(module, callback, averaging, Zero(), epochs=1)
    assert module.net[4].num_features == 6
    assert averaging._average_model.module.net[4].num_features == 6


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumes_to_the_last_bit(epoch: int, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch and trainer.fit_loop.epoch_loop.batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "end.ckpt")

    def run(resume: Path | None = None) -> tuple[dict[str, Any], SlimmingCallback]:
        callback = slimming(
            budget={"macs": 0.3},
            rho=0.2,
            threshold=0.92,
            average_decay=0.5,
            shrink_at=0.05,
            end_epoch=2,
            warmup_steps=9,
            submodule=None,
        )
        order = [callback] if resume else [Save(), callback]  # an epoch's end is saved before its cut
        found = kill.fit(Classifier(), shuffled(), order, resume, max_epochs=4)
        return found, callback

    whole, callback = run()
    assert [cut[0] for cut in whole["cuts"]] == [1, 2]
    for path in ("within.ckpt", "end.ckpt"):
        found, resumed = run(tmp_path / path)
        assert same(found, whole), path
        assert resumed.changes == callback.changes
        assert same(resumed.state_dict()["average"], callback.state_dict()["average"])


def test_a_slimmed_checkpoint_loads_without_a_trainer(tmp_path: Path) -> None:
    module, callback = Small(), slimming(budget={"macs": 0.6}, rho=0.01)
    trainer = fit(module, callback)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    fresh = load_pruned(Small(), tmp_path / "small.ckpt")
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    assert fresh.net[1].num_features == module.net[1].num_features < 8


def test_mobilenet_encoders_of_smp_are_slimmed() -> None:
    net = Unet(
        "mobilenet_v2", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8)
    )
    scaled(net, 0.0, every=4)
    example = torch.randn(1, 1, 32, 32)
    graph = trace(net, example)
    inside = [n for n in norm_scales(graph, net) if n.startswith("encoder") and ".conv." in n]
    scales = slimmable(graph, net, norms=inside)
    sizes = scale_sizes(graph, scales, [{name: net.get_parameter(name) for name in scales}])
    plan = ShrinkRules({}, limits=Limits(1.0)).plan(graph, sizes, DenseSizes.of(graph))
    measured = Measured([net], graph, scales, plan.remove, ((example,), {}))
    prune_(net, graph, plan)
    folded = measured.fold_(plan.remove)
    assert plan.costs["macs"].after < 0.95 * plan.costs["macs"].before
    assert folded.exact > 10
    assert np.isfinite(measured.change())


# -- branches that vanish ------------------------------------------------------------------------------------------


def atoms(dead: Sequence[tuple[int, int, int]]) -> AtomMobile:
    """Some branches' depthwise scales are 0; stage, block and branch of each."""
    torch.manual_seed(0)
    net = AtomMobile(classes=3, width=0.5).eval()
    for stage, block, branch in dead:
        norm = net.stages[stage][block].branches[branch].depthwise[1]
        norm.weight.data.zero_()
        norm.bias.data.normal_()
    return net


def alive(net: AtomMobile) -> list[tuple[int, int, int]]:
    return [
        (s, b, k)
        for s, stage in enumerate(net.stages)
        for b, block in enumerate(stage)
        for k, branch in enumerate(block.branches)
        if branch.alive
    ]


def test_branches_that_lose_their_last_channel_vanish_and_come_back_from_the_record() -> None:
    dead = [(1, 0, 1), (2, 1, 0), (2, 1, 2)]
    net, example = atoms(dead), torch.randn(2, 1, 32, 32)
    dense, everything = copy.deepcopy(net), alive(net)
    graph = trace(net, example)
    scales = slimmable(graph, net, norms=["*.depthwise"])
    sizes = scale_sizes(graph, scales, [{name: net.get_parameter(name) for name in scales}])
    plan = ShrinkRules({}, limits=Limits(1.0)).plan(graph, sizes, DenseSizes.of(graph))
    measured = Measured([net], graph, scales, plan.remove, ((example,), {}))
    record = prune_(net, graph, plan)
    assert measured.fold_(plan.remove) == Folded(exact=2)
    assert measured.change() < 1e-5
    assert sorted({*everything} - {*alive(net)}) == dead
    again = trace(net, example)
    assert again.cost("macs") == plan.costs["macs"].after
    more = prune_(net, again, again.layers["stages.2.1.branches.1.expand.0.weight"][:5])
    small = PruningRecord.from_dict(record.then(more).to_dict()).apply_(dense).eval()
    small.load_state_dict(net.state_dict())
    assert torch.equal(small(example), net(example))


def test_one_branch_stays_whatever_the_scales_say() -> None:
    net, example = atoms([(1, 1, 0), (1, 1, 1), (1, 1, 2)]), torch.randn(1, 1, 32, 32)
    graph = trace(net, example)
    inside = [f"stages.1.1.branches.{branch}.expand.0.weight" for branch in range(3)]
    units = np.concatenate([graph.layers[name] for name in inside])
    with pytest.raises(
        SurgeryError, match=r"nothing would be left of 'stages\.1\.1\.project\.weight', dimension 1"
    ):
        prune_(net, graph, units)
    scales = slimmable(graph, net, norms=["*.depthwise"])
    sizes = scale_sizes(graph, scales, [{name: net.get_parameter(name) for name in scales}])
    prune_(net, graph, ShrinkRules({}, limits=Limits(1.0)).plan(graph, sizes, DenseSizes.of(graph)))
    assert [where for where in alive(net) if where[:2] == (1, 1)] == [(1, 1, 2)]
    assert net.stages[1][1].project.in_channels == 1


def test_elsewhere_a_record_may_not_empty_a_layer() -> None:
    net = atoms([])
    record = PruningRecord({"head.weight": {1: []}}, {"head.weight": list(net.head.weight.shape)})
    with pytest.raises(RecordError, match="not ascending within"):
        record.apply_(net)


class Segmenting(Small):
    """A network of atoms, whose every pixel has the class of its image."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda p: torch.optim.AdamW(p, 1e-3))
        self.net = atoms([(2, 0, 1), (3, 1, 2)]).train()

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self(nn.functional.interpolate(batch[0], size=(32, 32)))
        return nn.functional.cross_entropy(logits, (batch[1] % 3)[:, None, None].expand(-1, 32, 32))


def test_vanished_branches_survive_training_a_checkpoint_and_an_average(tmp_path: Path) -> None:
    module, averaging = Segmenting(), EMAWeightAveraging(decay=0.5)
    module.example_input_array = torch.zeros(1, 1, 32, 32)
    callback = slimming(rho=0.01, threshold=5e-3, shrink_at=0.01, norms=["*.depthwise"])
    trainer = fit(module, callback, averaging, epochs=2, limit_train_batches=2)
    gone = {(2, 0, 1), (3, 1, 2)}
    assert gone.isdisjoint(alive(module.net))
    assert [cut.epoch for cut in callback.history] == [0]  # and went on
    empty = [p for p in module.net.parameters() if not p.numel()]
    assert len(empty) == 12
    assert not any(p.requires_grad for p in empty)
    trainer.save_checkpoint(tmp_path / "atoms.ckpt")
    fresh = load_pruned(Segmenting(), tmp_path / "atoms.ckpt")
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    save_pruned(module.net, callback.record, tmp_path / "atoms.safetensors")
    assert torch.equal(load_pruned(atoms([]), tmp_path / "atoms.safetensors")(x), module(x))


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1e-4}, r"rho must be a number of 0 or more, got -0.0001"),
        ({"rho": float("nan")}, r"rho must be"),
        ({"threshold": -1.0}, r"threshold must be a number of 0 or more"),
        ({"shrink_at": 1.5}, r"shrink_at must be in \[0, 1\], got 1.5"),
        ({"average_decay": 2}, r"average_decay must be in \[0, 1\]"),
        ({"warmup_epochs": 2, "warmup_steps": 3}, r"give warmup_epochs or warmup_steps, not both"),
        ({"warmup_steps": -3}, r"warmup_steps must be"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimmingCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": ["encoder.*"]}, r"norm 'encoder\.\*' matches no layer; did you mean"),
        ({"by": "seconds"}, r"unknown resource 'seconds'"),
        ({"exclude": ["net.0", "net.3"]}, "nothing to prune"),
        ({"budget": {"macs": 1e-9}}, "cannot be met"),
        ({"budget": {"joules": 0.5}}, "unknown resource 'joules' in budget"),
    ],
)
def test_what_cannot_be_slimmed_is_said_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    module = Small()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(module, slimming(**{"submodule": None, **options}))
    assert same(module.state_dict(), before)


def test_networks_without_norms_are_refused() -> None:
    module = Small()
    module.net[1], module.net[4] = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="no norm to slim: no filter of this network meets a norm"):
        fit(module, slimming())


def test_frozen_norms_are_refused() -> None:
    module = Small()
    module.net[1].requires_grad_(False)
    module.net[4].requires_grad_(False)
    with pytest.raises(ValueError, match="or are frozen"):
        fit(module, slimming())


def test_the_penalty_makes_a_gradient_where_there_is_none() -> None:
    net = Small().net
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    penalty = Penalty.of(graph, net, slimmable(graph, net), "params")
    with torch.no_grad():
        net[1].weight[:2] = torch.tensor([0.0, -1.0])
    penalty.add_(0.5)
    p = penalty.weights["1.weight"]
    assert net[1].weight.grad[:3].tolist() == pytest.approx([0.0, -0.5 * float(p[1]), 0.5 * float(p[2])])
    assert net[0].weight.grad is None
