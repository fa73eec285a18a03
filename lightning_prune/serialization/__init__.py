"""Files: pruning records, pruned weights, exported networks."""
