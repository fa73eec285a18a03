"""Callback, history and record show in a line, or a table, what happened."""

from __future__ import annotations

from lightning_prune import FilterPruningCallback, NetAdaptCallback, PruningRecord, SlimmingCallback
from lightning_prune.pruning.cut_summary import CutSummary, History

CUTS = [
    CutSummary(
        1, 4, 2, {"macs": 100}, {"macs": 80}, {"macs": 0.8}, "amount", 0.5, change=0.01, change_unrepaired=0.2
    ),
    CutSummary(2, 6, 3, {"macs": 80}, {"macs": 50}, {"macs": 0.5}, "budget", 0.25, step=7),
]


def test_a_callback_names_its_budget_and_what_is_left() -> None:
    callback = FilterPruningCallback({"macs": 0.5, "params": 1000})
    assert repr(callback) == "FilterPruningCallback(budget: macs 50.0%, params 1000; no cuts yet)"
    callback.history = History(CUTS)
    assert repr(callback) == (
        "FilterPruningCallback(budget: macs 50.0%, params 1000; 2 cuts; left: macs 50.0%; budget not met)"
    )
    assert "epoch 2, step 7" in callback._repr_html_()


def test_every_callback_has_a_line() -> None:
    assert repr(SlimmingCallback({"macs": 0.5})).startswith("SlimmingCallback(budget: macs 50.0%")
    assert repr(NetAdaptCallback({"macs": 0.5})).startswith("NetAdaptCallback(budget: macs 50.0%")


def test_a_history_is_a_list_with_a_line_per_cut() -> None:
    history = History(CUTS)
    assert history == CUTS
    assert str(history).splitlines() == [str(cut) for cut in CUTS]
    assert repr(history) == "History(2 cuts, 10 filters, 50.0% of dense macs left)"
    assert history._repr_html_().count("<tr>") == 3
    assert "<td>0.2</td>" in history._repr_html_()
    assert (str(History()), repr(History()), History()._repr_html_()) == (
        "no cuts",
        "History(0 cuts)",
        "<p>no cuts</p>",
    )
    assert repr(CUTS[0]) == f"CutSummary({CUTS[0]})"


def test_a_history_comes_back_from_the_state_of_a_callback() -> None:
    callback, again = FilterPruningCallback({"macs": 0.5}), FilterPruningCallback({"macs": 0.5})
    callback.history = History(CUTS)
    again.load_state_dict(callback.state_dict())
    assert again.history == CUTS
    assert isinstance(again.history, History)


def test_a_record_says_how_much_it_cut() -> None:
    record = PruningRecord({"a<b": {0: [0, 2]}, "bias": {0: [0, 2]}}, {"a<b": [3, 4], "bias": [3]})
    assert repr(record) == "PruningRecord(2 tensors cut, 15 → 10 values)"
    assert "<td>3 x 4</td><td>2 x 4</td>" in record._repr_html_()
    assert "a&lt;b" in record._repr_html_()
    assert repr(PruningRecord()) == "PruningRecord(nothing cut)"
    large = PruningRecord({f"w{i}": {0: [0]} for i in range(2000)}, {f"w{i}": [2] for i in range(2000)})
    assert len(repr(large)) < 100
    assert "and 1700 more" in large._repr_html_()
