"""A training that is pruned, in one process or sharded over two: ``test_sharding.py`` compares the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from lightning_prune import L2, Pruner
from lightning_prune.criteria import TaylorGate


class Branches(nn.Module):
    """A residual block between odd widths, which two processes cannot share evenly; one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 9, 3, padding=1), nn.GroupNorm(1, 9)
        self.block = nn.Sequential(nn.Conv2d(9, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 9, 3, padding=1))
        self.head = nn.Linear(9, 3)
        self.block[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.block(x)).relu().mean((2, 3)))


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, 0.05, momentum=0.9)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, 1e-2)


#: name -> optimizer, arguments of fully_shard, arguments of the Pruner
CASES: dict[str, tuple[Callable[[Any], Optimizer], dict[str, Any], dict[str, Any]]] = {
    "default": (adam, {}, {}),
    "kept whole after the forward": (momentum, {"reshard_after_forward": False}, {"criterion": L2()}),
    "by steps": (momentum, {}, {"every_n_steps": 6, "compensate": False}),
}


def images() -> tuple[Tensor, Tensor]:
    pixels = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return pixels, (pixels.mean((1, 2, 3)) * 60).long() % 3


def train(name: str, rank: int, world: int) -> dict[str, Any]:
    """Train and prune; return losses, record, and whole weights and momenta by name."""
    make_optimizer, sharding, arguments = CASES[name]
    net, (pixels, labels) = Branches(), images()
    batches = list(pixels.split(8))
    pruner = Pruner(
        net, pixels[:1], {"macs": 0.5}, amount={"macs": 0.2}, batches=batches, verbose=False, **arguments
    )
    shard(net, world, **sharding)
    optimizer, losses = make_optimizer(net.parameters()), []
    share = 8 // world
    for epoch in range(5):
        for number, batch in enumerate(batches):
            own = slice(rank * share, (rank + 1) * share)
            with pruner.observe():
                loss = cross_entropy(net(batch[own]), labels.split(8)[number][own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(mean(loss.detach()))
            if pruner.counts_steps:
                pruner.step(optimizer, epoch * len(batches) + number + 1)
        if not pruner.counts_steps:
            pruner.step(optimizer, epoch)
    names = {parameter: key for key, parameter in net.named_parameters()}
    states = {
        f"{names[parameter]}: {key}": whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    assert pruner.record is not None
    return {
        "losses": losses,
        "record": pruner.record.to_dict(),
        "cuts": len(pruner.history),
        "finished": pruner.finished,
        "weights": {key: whole(value.detach()) for key, value in net.named_parameters()},
        "states": states,
        "trained": {key: value.requires_grad for key, value in net.named_parameters()},
        "groups": sum(len(group["params"]) for group in optimizer.param_groups),
        "classes": [type(module).__name__ for module in net.modules()],
    }


def shard(net: nn.Module, world: int, **arguments: Any) -> None:
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net.get_submodule("block"), **arguments)
        fully_shard(net, **arguments)


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def mean(loss: Tensor) -> float:
    if distributed.is_initialized():
        distributed.all_reduce(loss)
        loss /= distributed.get_world_size()
    return loss.item()


def refusals() -> dict[str, str]:
    """Return the messages of what is refused when the network is sharded."""
    messages: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except (NotImplementedError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    net, (pixels, _) = Branches(), images()
    pruner = Pruner(net, pixels[:1], {"macs": 0.5}, criterion=TaylorGate(), start_epoch=0, verbose=False)
    state = pruner.state_dict()
    shard(net, 2)
    before = [whole(value.detach()) for value in net.parameters()]
    attempt("too late", lambda: Pruner(net, pixels[:1], {"macs": 0.5}))
    attempt("loaded too late", lambda: pruner.load_state_dict(state))
    attempt("gradients", lambda: pruner.observe().__enter__())
    attempt("not observed", lambda: pruner.step(momentum(net.parameters()), 0))
    after = [whole(value.detach()) for value in net.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    attempt("two dimensions", lambda: shard_over_two_dimensions(pixels))
    return messages


def shard_over_two_dimensions(pixels: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    net = Branches()
    pruner = Pruner(net, pixels[:1], {"macs": 0.5}, criterion=L2(), start_epoch=0, verbose=False)
    shard(net, 2, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    pruner.step(momentum(net.parameters()), 0)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {name: train(name, rank, 2) for name in CASES}
    messages = refusals()
    torch.save({"results": results, "refusals": messages}, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def sharded_results(folder: Path) -> list[dict[str, Any]]:
    """Run all cases in two processes, and return the results of each."""
    multiprocessing.spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
