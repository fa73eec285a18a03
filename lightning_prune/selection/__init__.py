"""Choose the units to remove: budgets, limits, exclusions, channel multiples."""
