"""Live curves: TensorBoard, the default, and the Visdom logger with a real server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.cli.config import conf_dir

pytest.importorskip("visdom", reason="needs the extra visdom")
from lightning_prune.reporting.visdom import VisdomLogger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
LOGGED = [
    ({"train/loss": 2.0 - e, "train/miou": 0.1 * e, "val/miou": 0.2, "epoch": e}, 10 * e) for e in range(3)
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """Start a Visdom server and return its port."""
    port = free_port()
    start = "from visdom.server.run_server import main; main()"  # -m visdom.server would download scripts
    command = [sys.executable, "-W", "ignore", "-c", start, "-port", str(port), "--hostname", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "-env_path", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


def test_curves_arrive_at_a_real_server(server: int) -> None:
    import json

    logger = VisdomLogger("http://127.0.0.1", server, env="a run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for metrics, step in LOGGED:
            logger.log_metrics(metrics, step)
    client = logger.experiment
    window = json.loads(client.get_window_data(win="train/loss", env="a run"))
    (line,) = window["content"]["data"]
    assert (line["x"], line["y"]) == ([0, 1, 2], [2, 1, 0])
    assert set(json.loads(client.get_window_data(win=None, env="a run"))) == {
        "train/loss",
        "train/miou",
        "val/miou",
    }


def test_without_a_server_the_logger_warns_once_how_to_start_one() -> None:
    logger = VisdomLogger("http://127.0.0.1", port := free_port())
    with pytest.warns(UserWarning, match=f"no Visdom server answers.*python -m visdom.server -port {port}"):
        logger.log_metrics({"train/loss": 1.0, "epoch": 0}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no second warning
        logger.log_metrics({"train/loss": 1.0, "epoch": 1}, 2)
    assert logger.experiment is None


def test_tensorboard_is_the_default_and_contains_loss_and_miou(tmp_path: Path) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lightning_prune.cli.train import build

    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    quick = ["data.size=48", "data.slices_per_axis=6", "trainer.accelerator=cpu", "trainer.max_epochs=2"]
    quick += ["net=unet_small", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=quick)
    parts = build(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts.trainer.fit(parts.module, parts.data)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("train/loss", "train/miou", "val/miou"):
        assert len(events.Scalars(name)) == 2, name
