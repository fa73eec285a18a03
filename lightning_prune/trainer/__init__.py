"""What pruning needs of Lightning's Trainer: batches, checkpoints, optimizers, resuming."""
