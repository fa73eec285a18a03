"""Names of the study: its stages and methods, and the order in which they run."""

from __future__ import annotations

__all__ = [
    "CORE",
    "CRITERIA",
    "DEFAULT",
    "DENSE",
    "DISTILLED",
    "ENERGY",
    "FLAT",
    "LABELS",
    "LONG",
    "OMEGAS",
    "PEERS",
    "PUBLISHED",
    "SCRATCH",
    "STAGES",
    "THIN",
]

#: shares of the dense network's MACs
STAGES = (0.50, 0.26, 0.10, 0.05)
OMEGAS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT = "IPAD energy, omega 0.25"
DENSE, THIN, FLAT = "dense, trained on", "thin from scratch", "shallow from scratch"
#: method without a dense network -> depth of the network that is made thinner
SCRATCH = {THIN: 0, FLAT: 1}
PUBLISHED = tuple(f"IPAD, omega {omega:g}" for omega in OMEGAS)
ENERGY = tuple(f"IPAD energy, omega {omega:g}" for omega in OMEGAS)
CRITERIA = (
    "random",
    "uniform L1",
    "uniform L2",
    "LAMP",
    "Taylor",
    "output Taylor",
    "output energy",
    *PUBLISHED,
    *ENERGY,
    "slimming",
    "NetAdapt",
)
PEERS = ("torch-pruning, local", "torch-pruning, global", "torch-pruning, GroupNormPruner")
DISTILLED = tuple(f"{DEFAULT}, {loss}" for loss in ("soft targets", "CWD", "DIST"))
CORE = ("uniform L2", DEFAULT, "random", "LAMP", "output energy", "IPAD, omega 0.5", "IPAD, omega 1")
#: methods of the study with longer training
LONG = (DEFAULT, THIN, DISTILLED[-1])
LABELS = {
    "scenes": "Scenes: U-Net, mean IoU",
    "fashion": "Fashion-MNIST: ResNet-20, accuracy",
    "brain": "Brain slices: U-Net with ResNet encoder, mean IoU",
}
LABELS |= {
    f"{name}-{size}": f"{label} ({size})"
    for size in ("long", "small", "larger")
    for name, label in LABELS.items()
}
