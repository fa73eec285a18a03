"""A pruning callback, or a Pruner, in one line, and as HTML."""

from __future__ import annotations

from html import escape

from lightning_prune.pruning.cut_summary import History
from lightning_prune.selection.policy import PruningPolicy

__all__ = ["description", "html_description"]


def description(name: str, policy: PruningPolicy, history: History, within_budget: bool) -> str:
    """Return the name of a callback with its budget and what was cut so far.

    Example:
        >>> description("FilterPruningCallback", PruningPolicy({"macs": 0.5}), History(), False)
        'FilterPruningCallback(budget: macs 50.0%; no cuts yet)'
    """
    budget = ", ".join(f"{name} {_amount(value)}" for name, value in policy.budget.items())
    facts = [f"budget: {budget}"] if budget else []
    if history:
        left = ", ".join(f"{resource} {share:.1%}" for resource, share in history[-1].share.items())
        facts += [f"{len(history)} cut{'s' * (len(history) != 1)}", f"left: {left}"]
        facts += ["budget met" if within_budget else "budget not met"] if budget else []
    else:
        facts.append("no cuts yet")
    return f"{name}({'; '.join(facts)})"


def html_description(line: str, history: History) -> str:
    """Return the line of a callback, and the table of its cuts."""
    return f"<p><code>{escape(line)}</code></p>{history._repr_html_() if history else ''}"


def _amount(value: float) -> str:
    return f"{value:.1%}" if value <= 1 else f"{value:g}"
