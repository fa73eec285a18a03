"""Tests that the callback prunes under ``ModelParallelStrategy``, in two real processes, as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.test_ddp import start
from tests.support.sharded_lightning import fit, result

SCRIPT = Path(__file__).parents[1] / "support" / "sharded_lightning.py"


@pytest.mark.filterwarnings("ignore:.*(many workers|GPU available)")
def test_losses_and_record_are_those_of_one_process(tmp_path: Path) -> None:
    codes = [process.wait() for process in start(tmp_path, SCRIPT)]
    assert codes == [0, 0], "\n".join((tmp_path / f"log {rank}").read_text()[-3000:] for rank in (0, 1))
    (tmp_path / "alone").mkdir()
    alone = result(*fit(tmp_path / "alone", 1))
    for rank in (0, 1):
        sharded = torch.load(tmp_path / f"{rank}.pt")
        assert sharded["class"] == "FSDPBranches"
        assert sharded["record"] == alone["record"]
        assert sharded["cuts"] == alone["cuts"] != []
        assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(sharded["weights"][name], value, rtol=1e-3, atol=1e-4)
        assert "cannot be resumed under it: use Trainer" in sharded["resume"]
