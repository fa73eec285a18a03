"""When the teacher is made, moved, measured, copied, saved and checked: the callback of a mixin (level 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.pruning import pruning_callbacks
from lightning_prune.distillation.config import COPY, Distillation
from lightning_prune.distillation.distiller import Distiller, Projections, TapCall
from lightning_prune.distillation.setup import check_module, made, prepared
from lightning_prune.distillation.teacher import Teacher, TeacherError, found_again, load_weights_
from lightning_prune.distillation.teacher_scores import Scores, measure, swapped
from lightning_prune.serialization.record import PruningRecord, rerooted
from lightning_prune.trainer.batches import first_sample
from lightning_prune.trainer.step_outputs import replaced, task_of
from lightning_prune.trainer.training_state import target_of
from lightning_prune.utils.distributed import agreed
from lightning_prune.utils.example_inputs import Example, as_example

__all__ = ["DistillationCallback"]


class DistillationCallback(L.Callback):
    """Looks after the teacher of one module; made by :class:`~lightning_prune.distillation.DistillationMixin`.

    Attributes:
        teacher: the frozen network; None before ``setup``.
        scores: its validation metrics, measured once.
        started: whether it teaches yet: one that is copied from the student does so from the first cut on.
    """

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self.scores = Scores(distillation.metric, distillation.mode)
        self.started = False
        self._lessons: Distiller | None = None
        self._projections: Projections | None = None
        self._saved: dict[str, Any] = {}
        self._seen: tuple[PruningRecord, PruningRecord] | None = None

    # -- the callback's hooks, in the order in which they are called ------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the teacher while the student is still dense: a checkpoint may shrink it after this."""
        if stage != "fit":
            return
        if self.teacher is None:
            self.teacher = made(self.distillation, pl_module)
            self.started = self.distillation.teacher != COPY
        if pl_module.example_input_array is not None:
            self._prepare(trainer, pl_module, as_example(pl_module.example_input_array))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember which teacher there was; it is looked for when training starts."""
        self._saved = state_dict
        self.started = state_dict["started"]
        self.scores.found = state_dict["scores"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check, measure, listen."""
        teacher = self._restored(trainer)
        check_module(self.distillation, trainer, pl_module, self._projections)
        if self.distillation.teacher == COPY and not self.started and self._copied_at(trainer) is None:
            self._copy(pl_module)
        teacher.to(pl_module.device)
        agreed("the teacher", teacher.checksum)
        if self.started and not self.scores.found:
            with swapped(pl_module, self.distillation.submodule, teacher.net):
                self.scores.found = measure(trainer)
            self._log_scores(trainer)
        if self._lessons is not None:
            self._lessons.attach()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the input once, and at what has been cut."""
        if self._lessons is None:
            target = target_of(pl_module, self.distillation.submodule)
            self._prepare(trainer, pl_module, first_sample(batch, target)).attach()
        assert self._lessons is not None
        self._lessons.follow(self._record(trainer), pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy the student when the last epoch before the first cut is over."""
        due = not self.started and trainer.current_epoch == self._copied_at(trainer)
        if due and trainer.is_last_batch:
            self._copy(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the student is better than its teacher."""
        if trainer.sanity_checking or not self.started:
            return
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not self.scores.found and self.distillation.teacher == COPY:  # made a moment ago: its score
            self.scores.found = {name: value for name, value in now.items() if name.startswith("val")}
            self._log_scores(trainer)
        elif problem := self.scores.worse_than(now, trainer):
            rank_zero_warn(problem)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prove that the teacher is what it was."""
        if self.teacher is not None:
            self.teacher.verify()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the teacher beside the first checkpoint, once."""
        if self.started and self.teacher is not None:
            path = self._path(trainer)
            if trainer.is_global_zero and not path.exists():
                self.teacher.save(path)
            checkpoint["callbacks"][self.state_key]["file"] = str(path)

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was, and what has been learnt for its sake."""
        projections = self._projections
        weights = dict(projections.named_parameters()) if projections is not None else {}
        return {
            "started": self.started,
            "checksum": self.teacher.checksum if self.teacher else "",
            "scores": self.scores.found,
            "projections": {name: weight.detach().cpu() for name, weight in weights.items()},
        }

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        if self._lessons is not None:
            self._lessons.detach()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        self.teardown(trainer, pl_module, "exception")

    # -- one step ---------------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)
    def step(
        self, module: L.LightningModule, step: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """The module's own ``training_step``, and what the teacher adds to its loss."""
        lessons = self._lessons
        if lessons is None or lessons.active or not self.started:
            return step(module, *args, **kwargs)
        with lessons.listening() as calls:
            outputs = step(module, *args, **kwargs)
            task = task_of(outputs)
            if task is None:
                return outputs
            total = self._total(module, task, calls, args[0] if args else kwargs["batch"])
        return replaced(outputs, total)

    @torch.compiler.disable
    def _total(self, module: L.LightningModule, task: Tensor, calls: list[TapCall], batch: Any) -> Tensor:
        assert self._lessons is not None
        self._check_calls(calls)
        told, labels = self.distillation, self.distillation.labels_of(batch)
        parts = {"task": task, **self._lessons.parts(calls, labels, told.wanted)}
        weights = told.weights(progress(module.trainer))
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        self._log(module, {**parts, "total": total}, calls[0].output)
        return total

    def _check_calls(self, calls: list[TapCall]) -> None:
        if not calls:
            raise RuntimeError(
                "training_step ran, but the network that is distilled was not called: name the one that is by "
                "Distillation(submodule=...)"
            )

    def _log(self, module: L.LightningModule, parts: Mapping[str, Tensor], output: Any) -> None:
        size = len(self.distillation.logits(output))
        values = {f"distill/{name}": loss.detach() for name, loss in parts.items()}
        module.log_dict(values, on_step=False, on_epoch=True, batch_size=size)

    # -- the teacher: made, copied, saved, found again -----------------------------------------------------------

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example) -> Distiller:
        """Find the taps and what surely goes wrong."""
        assert self.teacher is not None
        told, record = self.distillation, self._record(trainer)
        self._lessons = prepared(told, pl_module, self.teacher, record, example, self._projections)
        self._projections = self._lessons.projections
        return self._lessons

    def _copied_at(self, trainer: L.Trainer) -> int | None:
        """The epoch at whose end the student is first cut; None: nobody cuts it."""
        timings = [callback.timing for callback in pruning_callbacks(trainer)]
        if any(timing.by_steps for timing in timings):
            raise ValueError(
                f"teacher={COPY!r} is scored by the validation of the epoch that the first cut ends, and "
                "every_n_steps cuts within epochs: give a trained teacher, or cut every_n_epochs"
            )
        return min((timing.start for timing in timings), default=None)

    def _copy(self, pl_module: L.LightningModule) -> None:
        """The student as it is now becomes the teacher."""
        assert self.teacher is not None
        self.teacher.net.load_state_dict(target_of(pl_module, self.distillation.submodule).state_dict())
        self._replace(Teacher(self.teacher.net, self.teacher.precision).to(pl_module.device))
        self.started = True

    def _replace(self, teacher: Teacher) -> None:
        self.teacher = teacher
        if self._lessons is not None:
            self._lessons.teacher = teacher

    def _path(self, trainer: L.Trainer) -> Path:
        """Beside the checkpoints."""
        assert self.teacher is not None
        beside = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return Path(beside) / f"teacher-{self.teacher.checksum[:12]}.pt"

    def _restored(self, trainer: L.Trainer) -> Teacher:
        """The teacher of the run that is resumed, else the one there is."""
        assert self.teacher is not None
        saved, self._saved = self._saved, {}
        if self._projections is not None:
            for name, weight in saved.get("projections", {}).items():
                self._projections.get_parameter(name).data.copy_(weight)
        if saved.get("started") and saved["checksum"] != self.teacher.checksum:
            path = found_again(saved.get("file", ""), str(trainer.ckpt_path))
            self._replace(Teacher(load_weights_(self.teacher.net, path), self.teacher.precision))
            if self.teacher.checksum != saved["checksum"]:
                raise TeacherError(f"{path} is not the teacher that this training was started with")
        return self.teacher

    def _record(self, trainer: L.Trainer) -> PruningRecord | None:
        """What has been removed, in the names of the distilled network."""
        told = self.distillation
        for callback in pruning_callbacks(trainer):
            if callback.record is not None:
                if self._seen is None or self._seen[0] is not callback.record:
                    here = rerooted(callback.record, callback.submodule or "", told.submodule or "")
                    self._seen = callback.record, here
                return self._seen[1]
        return told.record

    def _log_scores(self, trainer: L.Trainer) -> None:
        logged = {f"teacher/{name.removeprefix('val/')}": value for name, value in self.scores.found.items()}
        for logger in trainer.loggers if logged else ():
            logger.log_metrics({**logged, "epoch": trainer.current_epoch}, step=trainer.global_step)


def progress(trainer: L.Trainer) -> float:
    """The share of the training that is over, in [0, 1]; 0 where it has no end."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = trainer.fit_loop.batch_idx / batches if 0 < batches < math.inf else 0.0
        return min((trainer.current_epoch + within) / trainer.max_epochs, 1.0)
    return min(trainer.global_step / trainer.max_steps, 1.0) if trainer.max_steps > 0 else 0.0
