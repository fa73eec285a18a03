"""Access to Lightning's Trainer for pruning callbacks: batches, checkpoints, optimizers, resuming."""
