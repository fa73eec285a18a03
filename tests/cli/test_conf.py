"""Tests that every option of every group of conf/ composes and instantiates into an object of the right kind."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.callbacks.checkpoints import BestOfLast, BudgetCheckpoint, BudgetEarlyStopping
from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.callbacks.netadapt import NetAdaptCallback
from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.callbacks.slimming import SlimmingCallback
from lightning_prune.classification.module import ClassificationModule
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import build, with_teacher
from lightning_prune.data import BrainSlices, signed_distances
from lightning_prune.graph.layer_costs import LayerCost
from lightning_prune.latency.table import LatencyTable
from lightning_prune.segmentation.losses import loss_of, scheduled
from lightning_prune.segmentation.module import SegmentationModule
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.policy import PolicyArguments
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO

CONF = Path(__file__).parents[2] / "conf"
#: criteria for which a configuration has all arguments
FULL_CRITERIA = ["random", "fpgm", "norm_scale", "taylor_weight", "taylor_gate", "activation_mean"]
FULL_CRITERIA += ["propagated", "cost_aware", "normalised"]
FOLDER_DATA = ["data=folder", "data.root=somewhere", "task.num_classes=2"]
CLASS_FOLDERS = ["data=image_folder", "data.root=somewhere", "task.num_classes=2"]
CIFAR = ["data=cifar10", "data.root=somewhere"]
ITEMS_DATA = [["data=fashion_scenes"], ["data=fashion_mnist"], CIFAR]
EYE_DATA = [[f"data={name}", "data.root=somewhere"] for name in ("mobius", "sbvpi")]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def build_part(config: DictConfig, key: str) -> Any:
    return instantiate(config[key], _convert_="all")


@pytest.fixture(autouse=True)
def _output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the output folder that Hydra sets in a run."""
    hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)


def test_every_group_is_tested_here() -> None:
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}
    tested = {
        "module",
        "net",
        "data",
        "loss",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        "experiment",
        "distill",
    }
    assert groups == tested | {
        "prune",
        "prune/criterion",
        "prune/schedule",
        "prune/depth",
        "prune/final_phase",
        "prune/policy",
        "prune/resources",
        "checkpoint",
        "stopping",
        "sweep",  # tests/cli/test_sweeps.py
        "experiment/protocol",
    }


@pytest.mark.parametrize("option", options("net"))
def test_net(option: str) -> None:
    net = build_part(composed(f"net={option}", "task.in_channels=2", "task.num_classes=5"), "net").eval()
    expected = (1, 5) if option == "cifar_resnet" else (1, 5, 64, 64)
    with torch.no_grad():
        assert net(torch.zeros(1, 2, 64, 64)).shape == expected


@pytest.mark.parametrize("option", options("module"))
def test_module(option: str) -> None:
    kind = {"segmentation": SegmentationModule, "classification": ClassificationModule}[option]
    assert type(build_part(composed(f"module={option}"), "module")) is kind


@pytest.mark.parametrize("option", options("data"))
def test_data(option: str) -> None:
    overrides = {
        data[0].removeprefix("data="): data for data in (FOLDER_DATA, CLASS_FOLDERS, CIFAR, *EYE_DATA)
    }
    config = composed(*overrides.get(option, [f"data={option}"]))
    assert isinstance(build_part(config, "data"), L.LightningDataModule)


def test_task_describes_brain_slices() -> None:
    config = composed("data=brain", "data.size=48", "data.slices_per_axis=10")
    image, mask = build_part(config, "data").samples("train")[0]
    assert (config.task.in_channels, config.task.height, config.task.width) == tuple(image.shape)
    assert config.task.num_classes == BrainSlices.num_classes > int(mask.max())
    assert tuple(config.task.class_names) == BrainSlices.class_names


def value(loss: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss in epoch 5, since its weights may change, with distance maps as data modules make them."""
    distances = torch.stack([signed_distances(mask, logits.shape[1]) for mask in target])
    return loss_of(loss, logits, target, distances=distances, epoch=5)


@pytest.mark.parametrize("overrides", EYE_DATA)
def test_task_describes_eye_images(overrides: list[str]) -> None:
    config = composed(*overrides)
    data = build_part(config, "data")
    assert (config.task.height, config.task.width) == data.size
    assert (config.task.in_channels, config.task.num_classes) == (data.channels, data.num_classes)
    assert list(config.task.class_names) == ["background", "sclera", "iris", "pupil"][: data.num_classes]


@pytest.mark.parametrize("overrides", ITEMS_DATA)
def test_task_describes_items(overrides: list[str]) -> None:
    config = composed(*overrides)
    data = build_part(config, "data")
    assert (config.task.in_channels, config.task.num_classes) == (data.in_channels, data.num_classes)
    assert tuple(config.task.class_names) == data.class_names
    size = {"data=fashion_scenes": 48, "data=fashion_mnist": 28}.get(overrides[0], 32)
    assert (config.task.height, config.task.width) == (size, size)


@pytest.mark.parametrize("overrides", ITEMS_DATA)
def test_data_of_classification_choose_module_net_and_metric(overrides: list[str]) -> None:
    config = composed(*overrides)
    if overrides == ["data=fashion_scenes"]:
        assert (config.module._target_, config.distill.metric) == (composed().module._target_, "val/miou")
        return
    module = build_part(config, "module")
    assert type(module) is ClassificationModule
    assert config.distill.metric == "val/accuracy"
    assert module(module.example_input_array).shape == (1, 10)


@pytest.mark.parametrize("overrides", [["data=fashion_mnist"], ["module=classification"]])
@pytest.mark.parametrize("checkpoint", ["best", "best_of_last"])
def test_checkpoints_and_stopping_watch_the_score_of_the_task(overrides: list[str], checkpoint: str) -> None:
    config = composed(*overrides, f"checkpoint={checkpoint}", "stopping=budget")
    watched = [config.callbacks[name].monitor for name in ("best", "stopping")]
    assert watched == ["val/accuracy", "val/accuracy"]
    config = composed(f"checkpoint={checkpoint}", "stopping=budget")
    assert [config.callbacks[name].monitor for name in ("best", "stopping")] == ["val/miou", "val/miou"]


def test_the_net_of_the_user_is_used_with_data_of_classification() -> None:
    assert composed(*CIFAR, "net=ritnet").net._target_ == "lightning_prune.segmentation.RITnet"


@pytest.mark.parametrize("option", options("loss"))
def test_loss_ignores_pixels_of_the_ignored_class(option: str) -> None:
    loss = build_part(composed(f"loss={option}", "task.ignore_index=255"), "loss")
    target = torch.randint(0, 3, (2, 8, 8))
    target[:, :4] = 255
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    scalar = value(loss, logits, target)
    scalar.backward()
    assert scalar.ndim == 0
    assert logits.grad is not None
    assert logits.grad[:, :, 4:].abs().sum() > 0
    assert logits.grad[:, :, :4].abs().sum() == 0


@pytest.mark.parametrize("option", options("loss"))
def test_loss_without_ignored_pixels(option: str) -> None:
    loss = build_part(composed(f"loss={option}"), "loss")
    target = torch.randint(0, 3, (2, 8, 8))
    right = 20.0 * (2 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1) - 1)
    least = -1.0 if option in ("surface", "ritnet") else 0.0  # negative distances lower the loss
    assert least <= value(loss, right, target) < 0.01 < value(loss, -right, target)


def test_losses_that_need_distance_maps_configure_the_data_to_make_them() -> None:
    with_maps = {option: composed(f"loss={option}").data.distance_maps for option in options("loss")}
    assert {option for option, maps in with_maps.items() if maps} == {"surface", "ritnet"}


def test_weights_of_the_ritnet_loss_change_over_125_epochs_or_a_shorter_training() -> None:
    for epochs, half in (1000, 62.5), (20, 10):
        loss = build_part(composed("loss=ritnet", f"trainer.max_epochs={epochs}"), "loss")
        assert scheduled(loss, 0) == {"dice": 1.0, "surface": 0.0}
        assert scheduled(loss, half) == {"dice": 0.5, "surface": 0.5}
    loss = build_part(composed("loss=ritnet", "loss.weights.dice.epochs=4"), "loss")
    assert scheduled(loss, 1) == {"dice": 0.75, "surface": 0.25}


@pytest.mark.parametrize("option", options("optimizer"))
def test_optimizer(option: str) -> None:
    layer = nn.Linear(2, 1)
    build_part(composed(f"optimizer={option}", "optimizer.lr=0.25"), "optimizer")(layer.parameters())
    optimizer = build_part(composed(f"optimizer={option}"), "optimizer")(layer.parameters())
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (layer.weight < before).all()


@pytest.mark.parametrize("option", options("scheduler"))
def test_scheduler(option: str) -> None:
    config = composed(f"scheduler={option}")
    if option == "none":
        assert config.scheduler is None
        return
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=1.0)
    assert build_part(config, "scheduler")(optimizer).optimizer is optimizer


@pytest.mark.parametrize("option", options("prune"))
def test_prune(option: str) -> None:
    config = composed(f"prune={option}")
    if option == "none":
        assert config.prune is None
        return
    callback = build_part(config, "prune")
    expected = {"slimming": SlimmingCallback, "netadapt": NetAdaptCallback}.get(option, FilterPruningCallback)
    assert type(callback) is expected
    if option == "slimming":
        assert callback.policy.budget == {"macs": 0.5}
        return
    criterion = {"netadapt": "l2", "oneshot": "l2"}.get(option, option)
    assert type(callback.criterion).__name__.lower() == criterion
    assert callback.policy.budget == {"macs": 0.5}


def test_a_resource_of_the_user() -> None:
    """As in docs/guides/budgets.md."""
    overrides = (
        (CONF.parent / "docs" / "guides" / "budgets.md")
        .read_text()
        .split("energy=prune.resources.energy\n")[1]
    )
    words = overrides.split("```")[0].replace("$energy", "prune.resources.energy").replace("\\\n", "")
    words = words.replace("package.module.energy", "math.dist")
    callback = build_part(composed(*words.split()[1:]), "prune")
    assert type(callback) is FilterPruningCallback
    assert callback.policy.budget == {"macs": 0.5, "energy": 0.6}
    assert callback.policy.resources == {"energy": LayerCost(math.dist)}


def test_limits_by_type_and_of_channels() -> None:
    words = [
        "+prune.limits.overrides={torch.nn.Linear:{share:0.5,of:channels},Conv2d:0.8}",
        "prune.limits.of=channels",
    ]
    limits = build_part(composed(*words), "prune").policy.limits
    assert limits.of == "channels"
    assert str(limits.of_layer("head", nn.Linear)) == "50% of its channels may go"
    assert str(limits.of_layer("stem", nn.Conv2d)) == "80% of its channels may go"


@pytest.mark.parametrize("option", options("prune/resources"))
def test_resources(option: str) -> None:
    overrides = f"+prune/resources={option}", "~prune.budget.macs", f"+prune.budget.{option}=0.5"
    callback = build_part(composed(*overrides), "prune")
    assert callback.policy.budget == {option: 0.5}
    assert isinstance(callback.policy.resources[option], LatencyTable)


@pytest.mark.parametrize("option", options("prune/criterion"))
def test_criterion(option: str) -> None:
    path = ["prune.criterion.path=lightning_prune.criteria.ipad_importance"] if option == "function" else []
    criterion = build_part(composed(f"prune/criterion={option}", "seed=7", *path), "prune").criterion
    assert callable(criterion)
    omega = {"ipad": 1.0, "ipad_weights": 1.0, "ipad_activations": 0.0, "activation_deviation": 0.0}.get(
        option
    )
    omega = {"ipad_published": 0.5, "ipad_global": 0.5, "ipad_energy": 0.25}.get(option, omega)
    assert getattr(criterion, "omega", None) == omega
    assert getattr(criterion, "seed", 7) == 7


@pytest.mark.parametrize("option", options("prune/depth"))
def test_depth(option: str) -> None:
    depth = build_part(composed(f"prune/depth={option}"), "prune").policy.depth
    if depth is not None:
        depth = replace(depth, include=tuple(depth.include), exclude=tuple(depth.exclude))
    assert depth == (None if option == "none" else DepthSettings())


@pytest.mark.parametrize("option", options("prune/schedule"))
def test_schedule(option: str) -> None:
    path = ["prune.schedule.function.path=math.sqrt"] if option == "curve" else []
    schedule = build_part(composed(f"prune/schedule={option}", *path), "prune").timing.schedule
    halfway = {"fixed": None, "linear": 0.5, "cubic": 0.875, "one_shot": 1.0, "curve": 0.5**0.5}[option]
    assert (schedule and schedule(4)) == halfway


@pytest.mark.parametrize("option", options("prune/final_phase"))
def test_final_phase(option: str) -> None:
    final = build_part(composed(f"prune/final_phase={option}"), "prune").retraining.final_phase
    if option == "none":
        assert final is None
        return
    module = build_part(composed("scheduler=none"), "module")
    plan = final(module)
    assert plan["optimizer"].param_groups[0]["lr"] == module.configure_optimizers().param_groups[0]["lr"]
    assert plan["lr_scheduler"]["scheduler"].T_max == final.epochs


@pytest.mark.parametrize("option", options("distill"))
def test_distill(option: str) -> None:
    distillation = build_part(composed(f"distill={option}", "task.ignore_index=255"), "distill")
    losses = {"none": [], "all": ["hinton", "attention", "fsp"], "self": ["hinton"]}
    assert distillation.wanted == losses.get(option, [option])
    assert distillation.copies_student == (option == "self")
    assert distillation.ignore_index == 255
    assert build_part(composed("distill.alpha=0.5"), "distill").wanted == ["hinton"]
    assert build_part(composed("distill=self", "distill.cwd=3"), "distill").wanted == ["hinton", "cwd"]


@pytest.mark.parametrize("option", options("distill"))
def test_an_option_of_distill_is_in_use_unless_all_weights_are_zero(option: str) -> None:
    """A loss beside the first three was dropped, as if it had no weight."""
    config = with_teacher(composed(f"distill={option}", "distill.teacher=before_cut"))
    assert (config.distill is None) == (option == "none")
    assert (
        with_teacher(composed("distill=cwd", "distill.teacher=before_cut", "distill.cwd=0")).distill is None
    )


@pytest.mark.parametrize("option", options("trainer"))
def test_trainer(option: str, tmp_path: Path) -> None:
    config = composed(f"trainer={option}", "trainer.accelerator=cpu", f"+trainer.default_root_dir={tmp_path}")
    assert isinstance(instantiate(config.trainer, logger=False), L.Trainer)


@pytest.mark.parametrize("option", options("logger"))
def test_logger(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if option in ("mlflow", "wandb", "trackio"):
        pytest.importorskip(option, reason=f"needs lightning-prune[{option}]")
    monkeypatch.chdir(tmp_path)  # where MLflow makes its database
    nodes = composed(f"logger={option}").logger.values()
    for node in nodes:
        assert set(node) - {"_target_"} <= set(arguments(get_class(node._target_)))
    loggers = [instantiate(node) for node in nodes]
    expected = {"none": 0, "csv_tensorboard": 2, "visdom": 2, "mlflow": 2, "wandb": 2, "trackio": 2}
    assert len(loggers) == expected.get(option, 1)
    assert all(isinstance(logger, Logger) for logger in loggers)


@pytest.mark.parametrize("option", options("checkpoint"))
def test_checkpoint(option: str) -> None:
    parts = build(composed(f"checkpoint={option}", "trainer.accelerator=cpu"))
    kinds = {type(callback) for callback in parts.trainer.checkpoint_callbacks}
    expected = {"last": ModelCheckpoint, "best": BudgetCheckpoint, "best_of_last": BestOfLast}
    assert kinds == ({expected[option]} if option in expected else set())
    assert isinstance(parts.trainer.strategy.checkpoint_io, AtomicCheckpointIO)


@pytest.mark.parametrize("option", options("stopping"))
def test_stopping(option: str) -> None:
    parts = build(composed(f"stopping={option}", "trainer.accelerator=cpu"))
    kinds = [type(c) for c in parts.trainer.early_stopping_callbacks]
    assert kinds == ([] if option == "none" else [BudgetEarlyStopping])


def small_experiment(experiment: str) -> list[str]:
    """Return overrides that make an experiment run here: a folder of data, no worker processes, small images."""
    root = ["data.root=somewhere"]
    full = [*root, "data.num_workers=0", "task.height=32", "task.width=48"]
    return [
        f"experiment={experiment}",
        "trainer.accelerator=cpu",
        *(full if experiment.endswith("_full") else root if experiment.startswith("cifar10") else []),
    ]


@pytest.mark.parametrize("option", options("experiment"))
def test_experiment(option: str) -> None:
    parts = build(composed(*small_experiment(option)))
    with torch.no_grad():
        logits = parts.module(parts.module.example_input_array)
    assert logits.shape[1] == parts.module.num_classes


@pytest.mark.parametrize("option", options("experiment"))
def test_the_dense_baseline_of_an_experiment(option: str) -> None:
    parts = build(composed(*small_experiment(option), "prune=none"))
    assert parts.pruning is None
    assert not any(isinstance(c, PruningCallback) for c in parts.trainer.callbacks)  # type: ignore[attr-defined]


def arguments(target: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    keywords = dict.fromkeys(PolicyArguments.__annotations__)
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {**named, **keywords} if is_open else named


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["prune=ipad"], "prune"),
        (["prune=ipad"], "prune.criterion"),
        *(([f"prune/criterion={option}"], "prune.criterion") for option in FULL_CRITERIA),
        (["prune=ipad"], "prune.limits"),
        (["+prune/resources=latency"], "prune.resources.latency"),
        (["prune=slimming"], "prune"),
        (["prune/depth=blocks"], "prune.depth"),
        (["prune/schedule=cubic"], "prune.schedule"),
        (["prune/schedule=linear"], "prune.schedule"),
        (["prune/schedule=curve"], "prune.schedule"),
        (["prune/final_phase=cosine"], "prune.final_phase"),
        (["prune=netadapt"], "prune"),
        (["prune=netadapt"], "prune.workers"),
        (["data=brain"], "data"),
        *((overrides, "data") for overrides in (FOLDER_DATA, *EYE_DATA, *ITEMS_DATA)),
        (["data=fashion_mnist"], "net"),
        *(([f"module={option}"], "module") for option in options("module")),
        (["distill=all"], "distill"),
    ],
)
def test_keys_are_the_arguments_of_the_constructor(overrides: list[str], key: str) -> None:
    node = OmegaConf.select(composed(*overrides), key)
    assert set(node) - {"_target_"} == set(arguments(get_class(node._target_)))


def test_the_application_has_the_defaults_of_the_callback() -> None:
    composed_, bare = build_part(composed(), "prune"), FilterPruningCallback({"macs": 0.5})
    assert composed_.criterion == bare.criterion
    assert composed_.policy.limits == bare.policy.limits
    assert composed_.timing == bare.timing
    assert composed_.method.statistics == bare.method.statistics
    settings, defaults = dict(vars(composed_.retraining)), dict(vars(bare.retraining))
    assert settings.pop("warmup").steps == defaults.pop("warmup").steps == 0
    assert settings == defaults


def test_values_are_the_defaults_of_the_constructor() -> None:
    """Defaults of configuration and constructor must stay equal."""
    data = [(overrides, "data") for overrides in ([], FOLDER_DATA, *EYE_DATA, *ITEMS_DATA)]
    for overrides, key in [*data, ([], "prune.limits"), (["prune=slimming"], "prune")]:
        node = OmegaConf.select(composed(*overrides), key)
        for name, default in arguments(get_class(node._target_)).items():
            if isinstance(default, (int, float, str, bool)):
                assert node[name] == default or name == "verbose", f"{key}.{name}"
