"""Every option of every group of conf/ composes and instantiates into what its group promises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
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
from lightning_prune.callbacks.netadapt import NetAdaptCallback
from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.callbacks.slimming import SlimmingCallback
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import build
from lightning_prune.data import BrainSlices, signed_distances
from lightning_prune.graph.layer_costs import LayerCost
from lightning_prune.latency.table import LatencyTable
from lightning_prune.segmentation.losses import loss_of, scheduled
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO

CONF = Path(__file__).parents[2] / "conf"
#: criteria whose every argument can be given
INITIALISED = ["random", "fpgm", "norm_scale", "taylor_weight", "taylor_gate", "activation_mean"]
INITIALISED += ["propagated", "cost_aware", "normalised"]
FOLDER_DATA = ["data=folder", "data.root=somewhere", "task.num_classes=2"]
EYES = [[f"data={name}", "data.root=somewhere"] for name in ("mobius", "sbvpi")]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def made(config: DictConfig, key: str) -> Any:
    return instantiate(config[key], _convert_="all")


@pytest.fixture(autouse=True)
def _output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hydra knows inside a run."""
    inside = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", inside)


def test_every_group_is_tested_here() -> None:
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}
    tested = {"net", "data", "loss", "optimizer", "scheduler", "trainer", "logger", "experiment", "distill"}
    assert groups == tested | {
        "prune",
        "prune/criterion",
        "prune/schedule",
        "prune/final_phase",
        "prune/resources",
        "checkpoint",
        "stopping",
        "experiment/protocol",
    }


@pytest.mark.parametrize("option", options("net"))
def test_net(option: str) -> None:
    net = made(composed(f"net={option}", "task.in_channels=2", "task.num_classes=5"), "net").eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 2, 64, 64)).shape == (1, 5, 64, 64)


@pytest.mark.parametrize("option", options("data"))
def test_data(option: str) -> None:
    given = {folder[0].removeprefix("data="): folder for folder in (FOLDER_DATA, *EYES)}
    config = composed(*given.get(option, [f"data={option}"]))
    assert isinstance(made(config, "data"), L.LightningDataModule)


def test_what_the_task_says_of_brain_slices_is_true() -> None:
    config = composed("data=brain", "data.size=48", "data.slices_per_axis=10")
    image, mask = made(config, "data").samples("train")[0]
    assert (config.task.in_channels, config.task.height, config.task.width) == tuple(image.shape)
    assert config.task.num_classes == BrainSlices.num_classes > int(mask.max())
    assert tuple(config.task.class_names) == BrainSlices.class_names


def value(loss: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In epoch 5 of a training of which a loss may change its weights; distances as the data modules make them."""
    distances = torch.stack([signed_distances(mask, logits.shape[1]) for mask in target])
    return loss_of(loss, logits, target, distances=distances, epoch=5)


@pytest.mark.parametrize("overrides", EYES)
def test_what_the_task_says_of_eyes_is_true(overrides: list[str]) -> None:
    config = composed(*overrides)
    data = made(config, "data")
    assert (config.task.height, config.task.width) == data.size
    assert (config.task.in_channels, config.task.num_classes) == (data.channels, data.num_classes)
    assert list(config.task.class_names) == ["background", "sclera", "iris", "pupil"][: data.num_classes]


@pytest.mark.parametrize("option", options("loss"))
def test_loss_ignores_what_it_is_told_to(option: str) -> None:
    loss = made(composed(f"loss={option}", "task.ignore_index=255"), "loss")
    target = torch.randint(0, 3, (2, 8, 8))
    target[:, :4] = 255
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    found = value(loss, logits, target)
    found.backward()
    assert found.ndim == 0
    assert logits.grad is not None
    assert logits.grad[:, :, 4:].abs().sum() > 0
    assert logits.grad[:, :, :4].abs().sum() == 0


@pytest.mark.parametrize("option", options("loss"))
def test_loss_without_ignored_pixels(option: str) -> None:
    loss = made(composed(f"loss={option}"), "loss")
    target = torch.randint(0, 3, (2, 8, 8))
    right = 20.0 * (2 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1) - 1)
    least = -1.0 if option in ("surface", "ritnet") else 0.0  # being far inside of a boundary is a gain
    assert least <= value(loss, right, target) < 0.01 < value(loss, -right, target)


def test_a_loss_that_needs_distance_maps_has_the_data_make_them() -> None:
    wanted = {option: composed(f"loss={option}").data.distance_maps for option in options("loss")}
    assert {option for option, maps in wanted.items() if maps} == {"surface", "ritnet"}


def test_ritnet_s_loss_fades_over_125_epochs_or_the_whole_of_a_shorter_training() -> None:
    for epochs, half in (1000, 62.5), (20, 10):
        loss = made(composed("loss=ritnet", f"trainer.max_epochs={epochs}"), "loss")
        assert scheduled(loss, 0) == {"dice": 1.0, "surface": 0.0}
        assert scheduled(loss, half) == {"dice": 0.5, "surface": 0.5}
    loss = made(composed("loss=ritnet", "loss.weights.dice.epochs=4"), "loss")
    assert scheduled(loss, 1) == {"dice": 0.75, "surface": 0.25}


@pytest.mark.parametrize("option", options("optimizer"))
def test_optimizer(option: str) -> None:
    layer = nn.Linear(2, 1)
    made(composed(f"optimizer={option}", "optimizer.lr=0.25"), "optimizer")(layer.parameters())
    optimizer = made(composed(f"optimizer={option}"), "optimizer")(layer.parameters())
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
    assert made(config, "scheduler")(optimizer).optimizer is optimizer


@pytest.mark.parametrize("option", options("prune"))
def test_prune(option: str) -> None:
    config = composed(f"prune={option}")
    if option == "none":
        assert config.prune is None
        return
    callback = made(config, "prune")
    assert isinstance(callback, FilterPruningCallback)
    if option == "slimming":
        assert isinstance(callback, SlimmingCallback)
        assert callback.rules.budget == {"macs": 0.5}
        return
    assert isinstance(callback, NetAdaptCallback) == (option == "netadapt")
    named = {"netadapt": "l2", "oneshot": "l2"}.get(option, option)
    assert type(callback.criterion).__name__.lower() == named
    assert callback.rules.budget == {"macs": 0.5}


def test_a_resource_of_one_s_own() -> None:
    """As in docs/guides/budgets.md."""
    overrides = (CONF.parent / "docs" / "guides" / "budgets.md").read_text().split("energy=prune.resources.energy\n")[1]
    words = overrides.split("```")[0].replace("$energy", "prune.resources.energy").replace("\\\n", "")
    words = words.replace("package.module.energy", "math.dist")
    callback = made(composed(*words.split()[1:]), "prune")
    assert isinstance(callback, FilterPruningCallback)
    assert callback.rules.budget == {"macs": 0.5, "energy": 0.6}
    assert callback.rules.resources == {"energy": LayerCost(math.dist)}


def test_limits_by_type_and_of_channels() -> None:
    words = [
        "+prune.limits.overrides={torch.nn.Linear:{share:0.5,of:channels},Conv2d:0.8}",
        "prune.limits.of=channels",
    ]
    limits = made(composed(*words), "prune").rules.limits
    assert limits.of == "channels"
    assert str(limits.of_layer("head", nn.Linear)) == "50% of its channels may go"
    assert str(limits.of_layer("stem", nn.Conv2d)) == "80% of its channels may go"


@pytest.mark.parametrize("option", options("prune/resources"))
def test_resources(option: str) -> None:
    overrides = f"+prune/resources={option}", "~prune.budget.macs", f"+prune.budget.{option}=0.5"
    callback = made(composed(*overrides), "prune")
    assert callback.rules.budget == {option: 0.5}
    assert isinstance(callback.rules.resources[option], LatencyTable)


@pytest.mark.parametrize("option", options("prune/criterion"))
def test_criterion(option: str) -> None:
    path = ["prune.criterion.path=lightning_prune.criteria.ipad"] if option == "function" else []
    criterion = made(composed(f"prune/criterion={option}", "seed=7", *path), "prune").criterion
    assert callable(criterion)
    omega = {"ipad": 1.0, "ipad_weights": 1.0, "ipad_activations": 0.0, "activation_deviation": 0.0}.get(
        option
    )
    omega = 0.5 if option in ("ipad_published", "ipad_global") else omega
    assert getattr(criterion, "omega", None) == omega
    assert getattr(criterion, "seed", 7) == 7


@pytest.mark.parametrize("option", options("prune/schedule"))
def test_schedule(option: str) -> None:
    path = ["prune.schedule.function.path=math.sqrt"] if option == "curve" else []
    schedule = made(composed(f"prune/schedule={option}", *path), "prune").timing.schedule
    halfway = {"fixed": None, "linear": 0.5, "cubic": 0.875, "one_shot": 1.0, "curve": 0.5**0.5}[option]
    assert (schedule and schedule(4)) == halfway


@pytest.mark.parametrize("option", options("prune/final_phase"))
def test_final_phase(option: str) -> None:
    final = made(composed(f"prune/final_phase={option}"), "prune").retraining.final_phase
    if option == "none":
        assert final is None
        return
    module = made(composed(), "module")
    plan = final(module)
    assert plan["optimizer"].param_groups[0]["lr"] == module.configure_optimizers().param_groups[0]["lr"]
    assert plan["lr_scheduler"]["scheduler"].T_max == final.epochs


@pytest.mark.parametrize("option", options("distill"))
def test_distill(option: str) -> None:
    wanted = made(composed(f"distill={option}", "task.ignore_index=255"), "distill")
    each = {"none": [], "all": ["hinton", "attention", "fsp"]}
    assert wanted.wanted == each.get(option, [option])
    assert wanted.ignore_index == 255
    assert made(composed("distill.alpha=0.5"), "distill").wanted == ["hinton"]


@pytest.mark.parametrize("option", options("trainer"))
def test_trainer(option: str, tmp_path: Path) -> None:
    config = composed(f"trainer={option}", "trainer.accelerator=cpu", f"+trainer.default_root_dir={tmp_path}")
    assert isinstance(instantiate(config.trainer, logger=False), L.Trainer)


@pytest.mark.parametrize("option", options("logger"))
def test_logger(option: str) -> None:
    loggers = [instantiate(logger) for logger in composed(f"logger={option}").logger.values()]
    assert len(loggers) == {"none": 0, "csv_tensorboard": 2, "visdom": 2}.get(option, 1)
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
    found = [type(c) for c in parts.trainer.early_stopping_callbacks]
    assert found == ([] if option == "none" else [BudgetEarlyStopping])


def at_hand(experiment: str) -> list[str]:
    """What one at full size needs here: a folder, no worker processes, and small images."""
    full = ["data.root=somewhere", "data.num_workers=0", "task.height=32", "task.width=48"]
    return [
        f"experiment={experiment}",
        "trainer.accelerator=cpu",
        *(full if experiment.endswith("_full") else []),
    ]


@pytest.mark.parametrize("option", options("experiment"))
def test_experiment(option: str) -> None:
    parts = build(composed(*at_hand(option)))
    with torch.no_grad():
        logits = parts.module(parts.module.example_input_array)
    assert logits.shape[1] == parts.module.num_classes


@pytest.mark.parametrize("option", options("experiment"))
def test_the_dense_baseline_of_an_experiment(option: str) -> None:
    parts = build(composed(*at_hand(option), "prune=none"))
    assert parts.pruning is None
    assert not any(isinstance(c, FilterPruningCallback) for c in parts.trainer.callbacks)  # type: ignore[attr-defined]


def arguments(target: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in parameters}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["prune=ipad"], "prune"),
        (["prune=ipad"], "prune.criterion"),
        *(([f"prune/criterion={option}"], "prune.criterion") for option in INITIALISED),
        (["prune=ipad"], "prune.limits"),
        (["+prune/resources=latency"], "prune.resources.latency"),
        (["prune=slimming"], "prune"),
        (["prune/schedule=cubic"], "prune.schedule"),
        (["prune/schedule=linear"], "prune.schedule"),
        (["prune/schedule=curve"], "prune.schedule"),
        (["prune/final_phase=cosine"], "prune.final_phase"),
        (["prune=netadapt"], "prune"),
        (["prune=netadapt"], "prune.workers"),
        (["data=brain"], "data"),
        *((overrides, "data") for overrides in (FOLDER_DATA, *EYES)),
        ([], "module"),
        (["distill=all"], "distill"),
    ],
)
def test_keys_are_the_constructor_s_arguments(overrides: list[str], key: str) -> None:
    node = OmegaConf.select(composed(*overrides), key)
    assert set(node) - {"_target_"} == set(arguments(get_class(node._target_)))


def test_the_application_prunes_as_the_bare_callback_does() -> None:
    composed_, bare = made(composed(), "prune"), FilterPruningCallback({"macs": 0.5})
    assert composed_.criterion == bare.criterion
    assert composed_.rules.limits == bare.rules.limits
    assert composed_.timing == bare.timing
    assert composed_.statistics == bare.statistics
    assert vars(composed_.retraining) == vars(bare.retraining)


def test_numbers_are_the_constructor_s_defaults() -> None:
    """What is not meant to differ must not drift apart."""
    data = [(overrides, "data") for overrides in ([], FOLDER_DATA, *EYES)]
    for overrides, key in [*data, ([], "prune.limits"), (["prune=slimming"], "prune")]:
        node = OmegaConf.select(composed(*overrides), key)
        for name, default in arguments(get_class(node._target_)).items():
            if isinstance(default, (int, float, str, bool)):
                assert node[name] == default or name == "verbose", f"{key}.{name}"
