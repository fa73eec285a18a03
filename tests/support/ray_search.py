"""The small search in this process and on a local Ray: prints whether both found the same bits."""

from __future__ import annotations

from dataclasses import replace

import ray
import torch
from joblib import parallel_config
from ray.util.joblib import register_ray

from lightning_prune.netadapt.rounds import Rounds
from tests.support.netadapt_search import RULES, searched

torch.set_num_threads(1)
given = {"rules": replace(RULES, budget={"macs": 0.8}), "rounds": Rounds(rounds=1, steps=2)}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
register_ray()
here, first = searched(**given)
with parallel_config("ray", n_jobs=2):
    there, second = searched(**given)
pairs = zip(here.state_dict().values(), there.state_dict().values(), strict=True)
print("same bits", all(torch.equal(a, b) for a, b in pairs) and first.record == second.record)
