"""The channel graph: which channels depend on which, what they cost, which are pinned."""
