"""Run the small search in this process and on a local Ray, and print whether the results are equal bit by bit."""

from __future__ import annotations

from dataclasses import replace

import ray
import torch
from joblib import parallel_config
from ray.util.joblib import register_ray

from lightning_prune.netadapt.rounds import Rounds
from tests.support.netadapt_search import RULES, run_search

torch.set_num_threads(1)
arguments = {"rules": replace(RULES, budget={"macs": 0.8}), "rounds": Rounds(rounds=1, steps=2)}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
register_ray()
local_net, local_result = run_search(**arguments)
with parallel_config("ray", n_jobs=2):
    ray_net, ray_result = run_search(**arguments)
pairs = zip(local_net.state_dict().values(), ray_net.state_dict().values(), strict=True)
print("same bits", all(torch.equal(a, b) for a, b in pairs) and local_result.record == ray_result.record)
