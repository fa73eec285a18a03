"""All processes of a distributed run take over the repair of the first one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from lightning_prune import trace
from lightning_prune.compensation.calibration import CompensationError, CompensationSettings
from lightning_prune.compensation.repair import cut_and_compensate_
from tests.support.nets import Small


def _run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Small()
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(rank))
    results = []
    for batches in ([images], [images[:1]] if rank == 0 else [images]):
        settings = CompensationSettings(refine_passes=2)
        graph = trace(model, images[:2])
        try:
            _, report = cut_and_compensate_(
                model, graph, graph.layers["inner.weight"][:2], batches, (), settings
            )
            results.append(report)
        except CompensationError as error:
            results.append(str(error))
    (folder / str(rank)).write_bytes(pickle.dumps((results, model.state_dict())))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("default")
def test_processes_end_with_the_same_bits(tmp_path):
    multiprocessing.spawn(_run, (tmp_path,), nprocs=2)
    (first, state), (second, other_state) = (pickle.loads((tmp_path / str(r)).read_bytes()) for r in (0, 1))
    assert first == second
    assert first[0].accepted
    assert first[1] == "repairing a cut needs at least two images, got 1"
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other_state.values(), strict=True))
