"""Lightning callbacks that prune during training."""
