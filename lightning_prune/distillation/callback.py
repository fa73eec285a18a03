"""Lightning callback of distillation: makes, measures, copies, saves and verifies the teacher, adds its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.method_callback import pruning_callbacks
from lightning_prune.distillation.config import BEFORE_CUT, Distillation
from lightning_prune.distillation.distiller import Distiller, Projections, TapCall
from lightning_prune.distillation.setup import build_distiller, build_teacher, check_module
from lightning_prune.distillation.teacher import Teacher, TeacherError, find_teacher_file, load_weights_
from lightning_prune.distillation.teacher_scores import TeacherScores, measure_scores, replace_student
from lightning_prune.serialization.record import PruningRecord, rerooted
from lightning_prune.trainer.batches import first_sample
from lightning_prune.trainer.step_outputs import step_loss, with_loss
from lightning_prune.trainer.training_state import target_of
from lightning_prune.utils.distributed import check_agreement
from lightning_prune.utils.example_inputs import Example, as_example

__all__ = ["DistillationCallback"]


class DistillationCallback(L.Callback):
    """Manages the teacher of one module; made by :class:`~lightning_prune.distillation.DistillationMixin`.

    Args:
        distillation: the options.

    Attributes:
        teacher: the frozen network; None before ``setup``.
        scores: its validation metrics, measured once.
        started: whether the distillation losses are in use; with a copy of the student only from the first cut on.

    Example:
        >>> DistillationCallback(Distillation("copy", alpha=0.5)).started
        False
    """

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self.scores = TeacherScores(distillation.metric, distillation.mode)
        self.started = False
        self._distiller: Distiller | None = None
        self._projections: Projections | None = None
        self._saved_state: dict[str, Any] = {}
        self._validated: tuple[int, dict[str, float]] = (-1, {})  # step and metrics of the latest validation
        self._rerooted: tuple[PruningRecord, PruningRecord] | None = (
            None  # callback's record, and the same rerooted
        )

    # -- the callback's hooks, in the order in which they are called ------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the teacher while the student is still dense: a checkpoint may shrink the student later."""
        if stage != "fit":
            return
        if self.teacher is None:
            self.teacher = build_teacher(self.distillation, pl_module)
            self.started = not self.distillation.copies_student
        if pl_module.example_input_array is not None:
            self._build_distiller(trainer, pl_module, as_example(pl_module.example_input_array))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state of a resumed run; its teacher is restored when training starts."""
        self._saved_state = state_dict
        self.started = state_dict["started"]
        self.scores.values = state_dict["scores"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore and check the teacher, measure its scores, register hooks on the student."""
        teacher = self._restore_teacher(trainer)
        check_module(self.distillation, trainer, pl_module, self._projections)
        self._check_first_cut(trainer, pl_module)
        teacher.to(pl_module.device)
        check_agreement("the teacher", teacher.checksum)
        if self.started and not self.scores.values:
            with replace_student(pl_module, self.distillation.submodule, teacher.net):
                self.scores.values = measure_scores(trainer)
            self._log_scores(trainer)
        if self._distiller is not None:
            self._distiller.attach()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Build the distiller from the first batch if there was no example input; pass on what was pruned."""
        if self._distiller is None:
            target = target_of(pl_module, self.distillation.submodule)
            self._build_distiller(trainer, pl_module, first_sample(batch, target)).attach()
        assert self._distiller is not None
        self._distiller.set_record(self._record(trainer), pl_module.device)

    def on_before_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the student before its first cut, if the copy is the teacher."""
        if self.teacher is not None and not self.started:
            self.teacher.copy_weights_(target_of(pl_module, self.distillation.submodule))

    def on_after_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start distillation, if it waited for the first cut."""
        if self.teacher is None or self.started:
            return
        self._start(self.teacher)
        step, metrics = self._validated
        if step == trainer.global_step:  # this validation scored the network that was copied
            self.scores.values = metrics
            self._log_scores(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn once if the student is better than its teacher."""
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        scores = {name: value for name, value in metrics.items() if name.startswith("val")}
        self._validated = trainer.global_step, scores
        if self.started and (warning := self.scores.warning(metrics, trainer)):
            rank_zero_warn(warning)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the teacher has not changed."""
        if self.teacher is not None:
            self.teacher.verify()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the teacher beside the first checkpoint; put the path of its file into every checkpoint."""
        if self.started and self.teacher is not None:
            path = self._teacher_path(trainer)
            if trainer.is_global_zero and not path.exists():
                self.teacher.save(path)
            checkpoint["callbacks"][self.state_key]["file"] = str(path)

    def state_dict(self) -> dict[str, Any]:
        """Return checksum and scores of the teacher, and the weights of the projections."""
        projections = self._projections
        weights = dict(projections.named_parameters()) if projections is not None else {}
        return {
            "started": self.started,
            "checksum": self.teacher.checksum if self.teacher else "",
            "scores": self.scores.values,
            "projections": {name: weight.detach().cpu() for name, weight in weights.items()},
        }

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the hooks from the student."""
        if self._distiller is not None:
            self._distiller.detach()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks from the student."""
        self.teardown(trainer, pl_module, "exception")

    # -- one training step ---------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)
    def step(
        self, module: L.LightningModule, step: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the module's own ``training_step`` and add the distillation losses to its loss."""
        distiller = self._distiller
        if distiller is None or distiller.active or not self.started:  # active: a base's step inside this one
            return step(module, *args, **kwargs)
        with distiller.recording() as calls:
            outputs = step(module, *args, **kwargs)
            task = step_loss(outputs)
            if task is None:
                return outputs
            total = self._total(module, distiller, task, calls, args[0] if args else kwargs["batch"])
        return with_loss(outputs, total)

    @torch.compiler.disable
    def _total(
        self, module: L.LightningModule, distiller: Distiller, task: Tensor, calls: list[TapCall], batch: Any
    ) -> Tensor:
        """Return the weighted sum of the task's loss and the distillation losses, and log all of them."""
        _check_calls(calls)
        names, labels = self.distillation.wanted, self.distillation.labels_of(batch)
        losses = {"task": task, **distiller.losses(calls, labels, names)}
        weights = self.distillation.weights(training_progress(module.trainer))
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        self._log(module, {**losses, "total": total}, calls[0].output)
        return total

    def _log(self, module: L.LightningModule, losses: Mapping[str, Tensor], output: Any) -> None:
        size = len(self.distillation.logits(output))
        values = {f"distill/{name}": loss.detach() for name, loss in losses.items()}
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=size)

    # -- the teacher: built, copied, saved, restored -------------------------------------------------------------

    def _build_distiller(
        self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example
    ) -> Distiller:
        """Trace the taps; raise for options that do not fit the two networks."""
        assert self.teacher is not None
        record = self._record(trainer)
        self._distiller = build_distiller(
            self.distillation, pl_module, self.teacher, record, example, self._projections
        )
        self._projections = self._distiller.projections
        return self._distiller

    def _check_first_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that a first cut is still to come, if the teacher is to be copied before it.

        Raises:
            TeacherError: the network was cut already, by a training that did not save its teacher.
        """
        if self.started:
            return
        callbacks = pruning_callbacks(trainer)
        if any(callback.record is not None for callback in callbacks):
            raise TeacherError(
                f"teacher={self.distillation.teacher!r} is copied before the first cut, and the resumed network was "
                "cut before without a teacher: give the checkpoint of the trained dense network"
            )
        if callbacks:
            return
        if self.distillation.teacher == BEFORE_CUT:
            rank_zero_warn("no pruning callback: there is no first cut at which distillation could start")
        else:
            assert self.teacher is not None
            self.teacher.copy_weights_(target_of(pl_module, self.distillation.submodule))
            self._start(self.teacher)

    def _start(self, teacher: Teacher) -> None:
        """Use the copied weights as the teacher from now on."""
        teacher.seal_()
        self.started = True

    def _set_teacher(self, teacher: Teacher) -> None:
        self.teacher = teacher
        if self._distiller is not None:
            self._distiller.teacher = teacher

    def _teacher_path(self, trainer: L.Trainer) -> Path:
        """Return the path of the teacher's file, in the folder of the checkpoints."""
        assert self.teacher is not None
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return Path(folder) / f"teacher-{self.teacher.checksum[:12]}.pt"

    def _restore_teacher(self, trainer: L.Trainer) -> Teacher:
        """Load the teacher and the projections of the resumed run, if there is one; return the teacher."""
        assert self.teacher is not None
        saved, self._saved_state = self._saved_state, {}
        if self._projections is not None:
            for name, weight in saved.get("projections", {}).items():
                self._projections.get_parameter(name).data.copy_(weight)
        if saved.get("started") and saved["checksum"] != self.teacher.checksum:
            path = find_teacher_file(saved.get("file", ""), str(trainer.ckpt_path))
            self._set_teacher(Teacher(load_weights_(self.teacher.net, path), self.teacher.precision))
            if self.teacher.checksum != saved["checksum"]:
                raise TeacherError(f"{path} is not the teacher that this training was started with")
        return self.teacher

    def _record(self, trainer: L.Trainer) -> PruningRecord | None:
        """Return what was removed so far, with names relative to the distilled network."""
        for callback in pruning_callbacks(trainer):
            if callback.record is not None:
                if self._rerooted is None or self._rerooted[0] is not callback.record:
                    inner = self.distillation.submodule or ""
                    record = rerooted(callback.record, callback.submodule or "", inner)
                    self._rerooted = callback.record, record
                return self._rerooted[1]
        return self.distillation.record

    def _log_scores(self, trainer: L.Trainer) -> None:
        scores = {f"teacher/{name.removeprefix('val/')}": value for name, value in self.scores.values.items()}
        for logger in trainer.loggers if scores else ():
            logger.log_metrics({**scores, "epoch": trainer.current_epoch}, step=trainer.global_step)


def _check_calls(calls: list[TapCall]) -> None:
    """Raise RuntimeError if the training step did not call the distilled network."""
    if not calls:
        raise RuntimeError(
            "training_step did not call the distilled network: name the network that it calls by "
            "Distillation(submodule=...)"
        )


def training_progress(trainer: L.Trainer) -> float:
    """Return the share of the training that is over, in [0, 1]; 0 for a training without end."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        share = trainer.fit_loop.batch_idx / batches if 0 < batches < math.inf else 0.0
        return min((trainer.current_epoch + share) / trainer.max_epochs, 1.0)
    return min(trainer.global_step / trainer.max_steps, 1.0) if trainer.max_steps > 0 else 0.0
