"""Contracts with Lightning's private members, one for each: a release that changes one fails here, by its name."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_prune
from lightning_prune.trainer import lightning_internals as internals

pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader"),
]
SAMPLES, BATCHES = torch.arange(8.0).reshape(8, 1), 4


class Module(L.LightningModule):
    """Logs its loss; fits a line to four batches of two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class At(L.Callback):
    """Calls a function of the trainer in one hook, each time, and collects its results."""

    def __init__(self, hook: str, function: Callable[[L.Trainer], Any]) -> None:
        self.results: list[Any] = []
        setattr(self, hook, lambda trainer, *_, **__: self.results.append(function(trainer)))


def loader(**arguments: Any) -> DataLoader:
    return DataLoader(SAMPLES, 2, **arguments)


def trainer(*callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
    }
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **arguments})


def results(hook: str, function: Callable[[L.Trainer], Any], **arguments: Any) -> list[Any]:
    """Return what a function of the trainer returns in each call of a hook, over a training of four batches."""
    callback = At(hook, function)
    trainer(callback, **arguments).fit(Module(), loader(), loader())
    return callback.results


# -- training data ---------------------------------------------------------------------------------------------


def test_data_source_can_be_replaced_before_the_loader_is_requested() -> None:
    class Half(internals.DataLoaderSource):
        def dataloader(self) -> Any:
            return DataLoader(super().dataloader().dataset[:4], 2)

    def replace(trainer: L.Trainer) -> None:
        source = internals.training_source(trainer)
        internals.set_training_source(trainer, Half(source.instance, source.name))

    halved = trainer(At("setup", replace))
    halved.fit(Module(), loader())
    assert halved.num_training_batches == 2


def test_combined_loader_is_that_of_the_fit_loop() -> None:
    assert internals.training_loader(trainer()) is None
    (training,) = results("on_train_start", internals.training_loader)
    assert torch.equal(training.flattened[0].dataset, SAMPLES)


@pytest.mark.parametrize(("mode", "number"), [("min_size", 2), ("max_size", 4)])
def test_mode_of_combined_loaders_is_copied(mode: str, number: int) -> None:
    assert internals.second_training_loader(trainer()) is None
    seconds: list[Any] = []
    fit = trainer(At("on_train_start", lambda it: seconds.append(internals.second_training_loader(it))))
    loaders = {"a": loader(), "b": DataLoader(SAMPLES[:4], 2)}
    combined = L.pytorch.utilities.CombinedLoader(loaders, mode)
    fit.fit(Pairs(), combined)
    assert seconds[0] is not combined
    assert len(list(seconds[0])) == number == fit.num_training_batches


class Pairs(Module):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return sum(self.layer(part).sum() for part in batch.values() if part is not None)


def test_before_batch_transfer_calls_the_hook_of_the_data_module() -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader()

        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch + 10 * dataloader_idx

    call = At(
        "on_train_start", lambda it: internals.before_batch_transfer(it.lightning_module, torch.zeros(1), 2)
    )
    trainer(call).fit(Module(), datamodule=Data())
    assert call.results[0].item() == 20


def test_sampler_of_a_loader_is_seeded_by_the_epoch() -> None:
    sampler = DistributedSampler(SAMPLES, num_replicas=2, rank=0)  # type: ignore[arg-type]
    internals.set_sampler_epoch(loader(sampler=sampler), 3)
    assert sampler.epoch == 3


def test_stateful_loaders_have_both_methods() -> None:
    class Stateful:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            return

    assert internals.is_stateful(Stateful())
    assert not internals.is_stateful(loader())


# -- loops -----------------------------------------------------------------------------------------------------


def test_fetcher_can_be_advanced_and_set_back() -> None:
    def skip(trainer: L.Trainer) -> tuple[int, bool]:
        fetcher = internals.prefetcher(trainer)
        assert fetcher is not None
        before = fetcher.fetched
        next(fetcher)
        fetcher.fetched -= 1
        return fetcher.fetched - before, fetcher.done

    assert internals.prefetcher(trainer()) is None
    assert results("on_train_epoch_start", skip) == [(0, False)]


@pytest.mark.filterwarnings("ignore:(Found|You are using the) .dataloader_iter.")
def test_a_step_that_takes_the_iterator_has_no_prefetcher() -> None:
    class Iterating(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self.layer(batch).sum()

    call = At("on_train_start", internals.prefetcher)
    trainer(call).fit(Iterating(), loader())
    assert call.results == [None]


def test_all_batches_are_started_with_the_last_one() -> None:
    assert results("on_train_batch_end", internals.all_batches_started) == [False, False, False, True]


def test_validation_is_due_by_the_trainers_interval() -> None:
    due = results("on_train_batch_end", internals.is_validation_due, val_check_interval=2)
    assert due == [False, True, False, True]


def test_accumulation_ends_with_a_step() -> None:
    accumulating = results("on_train_batch_end", internals.is_accumulating, accumulate_grad_batches=2)
    assert accumulating == [True, False, True, False]


def test_counted_steps_are_those_of_loggers() -> None:
    class Steps(L.pytorch.loggers.logger.DummyLogger):
        steps: list[int] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.steps.append(step)

    logger = Steps()
    fit = trainer(At("on_train_start", internals.count_step_of_batch), logger=logger, log_every_n_steps=1)
    fit.fit(Module(), loader())
    assert logger.steps == [1, 2, 3, 4]  # from 0 on without the additional step


def test_restart_ends_for_the_fit_loop_alone() -> None:
    loop = trainer().fit_loop
    loop.epoch_progress.current.ready = 1  # an epoch that is not finished
    loop.restarting = True
    assert loop.restarting
    internals.end_restart(loop.trainer)
    assert not loop.restarting
    assert loop.epoch_loop.restarting


def test_resuming_ends() -> None:
    loop = trainer().fit_loop
    loop.load_state_dict(loop.state_dict())
    assert loop.is_resuming
    internals.fetch_after_epoch_start(loop.trainer)
    assert not loop.is_resuming


def test_early_stop_waits_for_the_minimum_of_epochs() -> None:
    allowed = results("on_train_epoch_end", internals.may_stop_early, min_epochs=2, max_epochs=3)
    assert allowed == [False, True, True]


def test_counters_of_a_loop_are_reset() -> None:
    fit = trainer()
    fit.fit(Module(), loader())
    progress = fit.fit_loop.epoch_loop.batch_progress
    assert progress.total.ready == progress.current.ready == BATCHES
    internals.reset_loop(fit.fit_loop)
    assert progress.total.ready == progress.current.ready == 0


# -- trainer, strategy, module ---------------------------------------------------------------------------------


def test_hooks_of_all_callbacks_are_called() -> None:
    first, second = (At("on_sanity_check_start", lambda trainer: trainer) for _ in range(2))
    fit = trainer(first, second)
    fit.strategy.connect(Module())
    internals.call_callbacks(fit, "on_sanity_check_start")
    assert first.results == second.results == [fit]


def test_logged_values_are_forgotten() -> None:
    def names(trainer: L.Trainer) -> tuple[set[str], set[str]]:
        before = set(trainer.callback_metrics)
        internals.forget_logged(trainer)
        return before, set(trainer.callback_metrics)

    assert results("on_validation_end", names) == [({"loss", "val_loss"}, set())]


def test_a_static_graph_is_delayed_again() -> None:
    strategy = DDPStrategy(static_graph=True)
    assert strategy._pl_static_graph_delay_done is False
    strategy._pl_static_graph_delay_done = True
    internals.expect_first_backward(strategy)
    assert strategy._pl_static_graph_delay_done is False
    assert inspect.getsource(DDPStrategy).count("self._pl_static_graph_delay_done") == 3  # made, read, set


def test_optimizers_are_found_in_every_form_of_configuration() -> None:
    first, second = (torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1)
    assert internals.configured_optimizers(first) == [first]
    assert internals.configured_optimizers([first, second]) == [first, second]
    assert internals.configured_optimizers(([first], [scheduler])) == [first]
    assert internals.configured_optimizers({"optimizer": first, "lr_scheduler": scheduler}) == [first]


def test_a_compiled_module_is_recognised_after_lightning_has_unwrapped_it() -> None:
    compiled = At("on_fit_start", lambda it: internals.is_unwrapped_compiled(it.lightning_module))
    for module in torch.compile(Module(), backend="eager"), Module():
        trainer(compiled, max_epochs=0).fit(module, loader())
    assert compiled.results == [True, False]


@pytest.mark.parametrize(("path", "local"), [("runs/a.ckpt", True), (Path("a"), True), ("s3://b/a", False)])
def test_local_paths(path: str | Path, local: bool) -> None:
    assert internals.is_local_path(path) is local


# -- callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_has_average_and_scheduler() -> None:
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    assert internals.swa_average(swa) is None
    assert internals.swa_scheduler(swa) is None
    fit = trainer(swa, max_epochs=3)
    fit.fit(Module(), loader())
    average = internals.swa_average(swa)
    assert [tensor.shape for tensor in average.state_dict().values()] == [(1, 1), (1,)]  # type: ignore[union-attr]
    assert internals.swa_scheduler(swa).optimizer is fit.optimizers[0]


@pytest.mark.parametrize(
    ("limits", "last"), [({"max_epochs": 3}, 2), ({"max_epochs": -1, "max_steps": 2}, None)]
)
def test_stochastic_weight_averaging_has_a_last_epoch(limits: dict[str, int], last: int | None) -> None:
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    epochs: list[int | None] = []
    trainer(swa, At("on_fit_start", lambda it: epochs.append(internals.swa_last_epoch(swa))), **limits).fit(
        Module(), loader()
    )
    assert epochs == [last]


def test_a_checkpoint_is_compared_by_the_values_of_its_hook_if_it_may_be_saved(tmp_path: Path) -> None:
    class Odd(internals.ConditionalCheckpoint):
        def monitored(self, trainer: L.Trainer, values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**values, "rank": torch.tensor(float(trainer.current_epoch))}

        def may_save(self, trainer: L.Trainer) -> bool:
            return trainer.current_epoch % 2 == 1

    keep = Odd(tmp_path, monitor="rank", mode="max", save_top_k=9)
    trainer(keep, max_epochs=5, enable_checkpointing=True).fit(Module(), loader())
    assert sorted(float(score) for score in keep.best_k_models.values()) == [1.0, 3.0]


def test_early_stopping_compares_only_epochs_that_its_hook_allows() -> None:
    class Late(internals.ConditionalEarlyStopping):
        def may_check(self, trainer: L.Trainer) -> bool:
            trainer.callback_metrics["constant"] = torch.tensor(1.0)
            return trainer.current_epoch >= 2

    stop = Late("constant", patience=1, check_on_train_epoch_end=True)
    fit = trainer(stop, max_epochs=9)
    fit.fit(Module(), loader())
    assert fit.current_epoch == 4  # epoch 2 is the best so far, epoch 3 uses up the patience


def test_a_csv_writer_keeps_the_file_that_is_there_and_writes_it_again_by_its_hook(tmp_path: Path) -> None:
    class Noting(internals.LastingCSVWriter):
        def rewrite(self, columns: list[str]) -> None:
            rewritten.append(list(columns))
            super().rewrite(columns)

    rewritten: list[list[str]] = []
    file = tmp_path / "metrics.csv"
    file.write_text("loss,step\n3,0\n")
    writer = Noting(str(tmp_path))
    assert file.read_text() == "loss,step\n3,0\n"
    writer.log_metrics({"loss": 2, "score": 5}, 1)
    writer.save()
    assert rewritten == [["loss", "score", "step"]]
    assert file.read_text().split() == ["loss,score,step", "3,,0", "2,5,1"]


# -- no other module -------------------------------------------------------------------------------------------

PACKAGE = Path(lightning_prune.__file__).parent
MODULES = sorted(set(PACKAGE.rglob("*.py")) - {Path(internals.__file__)})
DEFINITIONS = re.compile(
    r"(?:\bdef |\bclass |\bself\.|^ *)(_[a-z]\w*)(?=\s*(?:\(|:|=[^=]))", re.MULTILINE | re.I
)


def private_names(folder: Path) -> set[str]:
    """Return the private names that the files of a folder define: functions, classes, attributes."""
    return {name for path in folder.rglob("*.py") for name in DEFINITIONS.findall(path.read_text())}


LIGHTNING = Path(L.__file__).parent
OF_LIGHTNING = private_names(LIGHTNING / "pytorch") | private_names(LIGHTNING / "fabric")
OF_TORCH = {name for kind in (nn.Module, torch.optim.Optimizer, DataLoader) for name in vars(kind)} | set(
    vars(nn.Module())
)


def private_uses(text: str) -> Iterator[str]:
    """Yield imports of private names from Lightning, and private attributes of objects that may be Lightning's.

    These are attributes of anything but ``self``, ``cls`` and ``super()``, whose name Lightning defines, while
    neither the module itself nor torch does.
    """
    defined = set(DEFINITIONS.findall(text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}.{name}" for name in names if name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr in OF_LIGHTNING - defined - OF_TORCH:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_uses_a_private_member_of_lightning(path: Path) -> None:
    assert list(private_uses(path.read_text())) == []


def test_private_members_are_recognised() -> None:
    text = "from lightning.pytorch.core.optimizer import _configure_optimizers\ntrainer.fit_loop._data_source = 1"
    assert list(private_uses(text)) == [
        "lightning.pytorch.core.optimizer._configure_optimizers",
        "trainer.fit_loop._data_source",
    ]
    assert len(set(private_uses(Path(internals.__file__).read_text()))) > 20


def classes() -> list[type]:
    names = [name for _, name, _ in pkgutil.walk_packages(lightning_prune.__path__, "lightning_prune.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    members = {member for module in modules for member in vars(module).values() if inspect.isclass(member)}
    return [kind for kind in members if kind.__module__.startswith("lightning_prune.")]


def test_no_other_class_overrides_a_private_method_of_lightning() -> None:
    overridden = {
        f"{kind.__qualname__}.{name}"
        for kind in classes()
        for base in kind.__mro__[1:]
        if base.__module__.startswith("lightning.") and kind.__module__ != internals.__name__
        for name in vars(kind).keys() & vars(base).keys()
        if name.startswith("_") and not name.startswith("__") and callable(vars(base)[name])
    }
    assert overridden == set()
