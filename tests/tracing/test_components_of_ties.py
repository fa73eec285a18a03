"""Components that grow with the ties are those of all ties at once."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lightning_prune.tracing.ids import Ties


def reference(pairs: list[tuple[int, int]], count: int) -> list[int]:
    left, right = zip(*pairs, strict=True) if pairs else ((), ())
    labels = connected_components(
        coo_matrix((np.ones(len(pairs)), (left, right)), shape=(count, count)), False
    )[1]
    first: dict[int, int] = {}
    return [first.setdefault(label, len(first)) for label in labels.tolist()]


def test_components_closures_and_pins_after_any_number_of_ties():
    random = np.random.default_rng(0)
    for _ in range(40):
        ties, pairs, pinned = Ties(), [], set()
        for _ in range(int(random.integers(1, 12))):
            ties.fresh(int(random.integers(1, 9)))
            for _ in range(int(random.integers(0, 4))):
                left, right = random.integers(0, ties.count, (2, int(random.integers(1, 5))))
                ties.tie(torch.from_numpy(left), torch.from_numpy(right))
                pairs += list(zip(left.tolist(), right.tolist(), strict=True))
            expected = reference(pairs, ties.count)
            everything = torch.arange(ties.count)
            if random.random() < 0.5:
                assert ties.components().tolist() == expected
            if random.random() < 0.5:
                chosen = int(random.integers(0, ties.count))
                mask = ties.closure(torch.tensor([chosen]))(everything)
                assert mask.tolist() == [label == expected[chosen] for label in expected]
            if random.random() < 0.3:
                pin = int(random.integers(0, ties.count))
                ties.pin(torch.tensor([pin]), "test")
                pinned.add(pin)
            labels = {expected[pin] for pin in pinned}
            assert ties.pinned_so_far()(everything).tolist() == [label in labels for label in expected]
        assert ties.components().tolist() == reference(pairs, ties.count)
