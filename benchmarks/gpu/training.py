"""Training that shrinks: precisions, optimizers, memory formats, ``torch.compile``, resuming."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from benchmarks.gpu.checks import Check, Place
from benchmarks.gpu.networks import CUTS, Segmenter, SmallUnet, gradual, images, loader, trainer_of, unet
from benchmarks.robustness.combination_run import OPTIMIZERS, Combination, run
from benchmarks.robustness.kill_run import EPOCHS, PRUNINGS, Classifier, fit, same, shuffled
from lightning_prune import load_pruned
from lightning_prune.utils.modules import named_tensors

__all__ = ["CHECKS"]

MIXED = ("32-true", "16-mixed", "bf16-mixed")


def trained(place: Place, precision: str = "32-true", **options: Any) -> dict[str, Any]:
    """Train a U-Net through three cuts; return losses, shares of MACs, and what is wrong.

    Args:
        place: where.
        precision: of the trainer.
        options: ``fused``, ``channels_last``, ``mode`` (of ``torch.compile``), ``averaged``, ``matmul`` (precision of
            float32 matrix products), and options of the trainer.
    """
    torch.set_float32_matmul_precision(options.pop("matmul", "highest"))
    channels_last, mode = options.pop("channels_last", False), options.pop("mode", "")
    net = SmallUnet(place.pick(32, 8)) if mode else unet(place)  # each cut compiles it anew
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    module = Segmenter(net, options.pop("fused", True), channels_last)
    if mode:
        net.compile(mode=mode)
    pruning = gradual(**options.pop("pruning", {}))
    averages = [EMAWeightAveraging(decay=0.9)] if options.pop("averaged", False) else []
    inspector = Inspector(place, net if channels_last else None)
    trainer = trainer_of(place, [pruning, *averages, inspector], precision=precision, **options)
    trainer.fit(module, loader(place))
    losses = module.mean_losses()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    figures = {
        "losses": losses,
        "macs": [round(cut.share["macs"], 3) for cut in pruning.history],
        "repaired": sum(cut.change is not None and not cut.not_repaired for cut in pruning.history),
        "cut_seconds": [round(cut.seconds, 2) for cut in pruning.history],
        "not_repaired": [cut.not_repaired for cut in pruning.history if cut.not_repaired],
        **({} if scaler is None else {"loss_scale": scaler.get_scale()}),
    }
    wrong = [
        *_wrong_cuts(figures["macs"]),
        *_wrong_losses(losses),
        *inspector.wrong,
        *_wrong_averages(averages, module),
    ]
    return {**figures, "wrong": wrong}


class Inspector(L.Callback):
    """Checks tensors and the optimizer's state when training ends: afterwards Lightning moves them to the CPU.

    Args:
        place: of the training.
        channels_last: network whose weights must have that memory format; None: none.
    """

    def __init__(self, place: Place, channels_last: nn.Module | None = None) -> None:
        self.place, self.channels_last = place, channels_last
        self.wrong = ["training did not end"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect what is wrong."""
        self.wrong = [*_wrong_tensors(pl_module, self.place), *_wrong_state(trainer)]
        self.wrong += [] if self.channels_last is None else _wrong_format(self.channels_last)


def _wrong_cuts(shares: list[float]) -> list[str]:
    right = len(shares) == CUTS and shares[-1] <= 0.501
    return [] if right else [f"MACs after the cuts: {shares}"]


def _wrong_losses(losses: list[float]) -> list[str]:
    if not all(map(math.isfinite, losses)):
        return [f"losses {losses}"]
    return [] if losses[-1] < losses[0] else [f"the loss did not fall: {losses}"]


def _wrong_tensors(module: nn.Module, place: Place) -> list[str]:
    return [
        f"{name} is on {x.device} or not finite"
        for name, x in named_tensors(module).items()
        if x.device.type != place.device.type or not bool(x.isfinite().all())
    ]


def _wrong_state(trainer: L.Trainer) -> list[str]:
    """Check that state has the shapes and the device of its parameters."""
    return [
        f"state {key} of shape {tuple(value.shape)} on {value.device}"
        for parameter, state in trainer.optimizers[0].state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
        and value.dim()
        and (value.shape != parameter.shape or value.device != parameter.device)
    ]


def _wrong_format(net: nn.Module) -> list[str]:
    return [
        f"{name} is not channels last any more"
        for name, x in net.named_parameters()
        if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)
    ]


def _wrong_averages(averages: list[EMAWeightAveraging], module: nn.Module) -> list[str]:
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    models = [average._average_model for average in averages]
    same_shapes = all(
        model is not None and {n: x.shape for n, x in model.module.state_dict().items()} == shapes
        for model in models
    )
    return [] if same_shapes else ["the average has other shapes than the network"]


def optimizers(place: Place) -> dict[str, Any]:
    """Train a tiny classifier with every optimizer, in every precision in turn, with and without accumulation."""
    names = place.pick(list(OPTIMIZERS), ["AdamW fused", "Adafactor"])
    precisions = MIXED if place.device.type == "cuda" else ("32-true", "bf16-mixed")
    rows = [
        Combination(name, "carry", precisions[i % len(precisions)], False, (1, 4)[i % 2])
        for i, name in enumerate(names)
    ]
    wrong: list[str] = []
    for row in rows:
        try:
            wrong += [f"{row}: {each}" for each in run(row, accelerator=place.accelerator).wrong]
        except Exception as error:  # the other optimizers are tried all the same
            wrong.append(f"{row}: {type(error).__name__}: {error}")
    return {
        "runs": [f"{row.optimizer}, {row.precision}, {row.accumulate} per step" for row in rows],
        "wrong": wrong,
    }


def resumed(place: Place, kind: str) -> dict[str, Any]:
    """Resume after the fifth of eight epochs, and compare the final state with that of one run, bit by bit."""
    warnings.filterwarnings("ignore")
    states, path = [], place.folder / f"resume-{kind}"
    for checkpoint in (None, path / "epoch=4.ckpt"):
        saving = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
        callbacks = [*PRUNINGS[kind](), *([] if checkpoint else [saving])]
        options = {"max_epochs": EPOCHS, "deterministic": True, "default_root_dir": path}
        states.append(
            fit(Classifier(), shuffled(), callbacks, checkpoint, accelerator=place.accelerator, **options)
        )
    different = [name for name in states[0] if not same(states[0][name], states[1][name])]
    return {
        "cuts": len(states[0]["cuts"]),
        "wrong": [f"different after resuming: {name}" for name in different],
    }


def carried(place: Place) -> dict[str, Any]:
    """Write a checkpoint on the device, load it on the CPU, and go on from it on the device."""
    path, net, pruning = place.folder / "carried", unet(place), gradual()
    saving = ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    module = Segmenter(net)
    trainer_of(place, [pruning, saving], enable_checkpointing=True).fit(module, loader(place))
    last = path / f"epoch={CUTS + 1}.ckpt"
    loaded = load_pruned(Segmenter(unet(place, seed=1)), last).eval()
    x = images(2, place.pick(96, 16), seed=1)[0]
    with torch.no_grad():
        expected, output = module.to(place.device).eval()(x.to(place.device)).cpu(), loaded(x)
    error = float((expected - output).abs().max() / expected.abs().max())
    again, cut = Segmenter(unet(place, seed=2)), gradual()
    inspector = Inspector(place)
    trainer = trainer_of(place, [cut, inspector], epochs=CUTS + 4)
    trainer.fit(again, loader(place), ckpt_path=last)
    wrong = [] if error < 0.01 else [f"outputs on the CPU differ by {error:.2g}"]
    wrong += inspector.wrong
    wrong += [] if cut.record == pruning.record else ["the record changed"]
    return {"error_on_cpu": error, "losses": [*module.mean_losses(), *again.mean_losses()], "wrong": wrong}


GPU = "16-mixed needs a GPU"
#: name -> (options of `trained`, why it needs a GPU)
TRAININGS: dict[str, tuple[dict[str, Any], str]] = {
    "train in 32-true": ({}, ""),
    "train with TF32": ({"matmul": "high"}, "TF32 needs a GPU"),
    "train in 16-mixed": ({"precision": "16-mixed"}, GPU),
    "train in 16-mixed, capturable, clipped": (
        {"precision": "16-mixed", "fused": False, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
        GPU,
    ),
    "train in bf16-mixed": ({"precision": "bf16-mixed"}, ""),
    "train in bf16-true": ({"precision": "bf16-true"}, ""),
    "train channels last": ({"precision": "bf16-mixed", "channels_last": True}, ""),
    "train without repair, averaged": ({"averaged": True, "pruning": {"compensate": False}}, ""),
}
#: name -> options of `trained`
COMPILED: dict[str, dict[str, Any]] = {
    "train compiled": {"precision": "bf16-mixed", "mode": "default", "channels_last": True},
    "train compiled with CUDA graphs": {"mode": "reduce-overhead"},
}

CHECKS = [
    *(
        Check(name, "correctness", partial(trained, **options), why)
        for name, (options, why) in TRAININGS.items()
    ),
    Check("every optimizer", "correctness", optimizers),
    *(
        Check(f"resume with the same bits: {kind}", "correctness", partial(resumed, kind=kind))
        for kind in ("filters", "compensation", "slimming", "averaged")
    ),
    Check("checkpoint from device to CPU and back", "correctness", carried),
    *(
        Check(name, "compiled", partial(trained, **options), "inductor is slow on a processor")
        for name, options in COMPILED.items()
    ),
]
