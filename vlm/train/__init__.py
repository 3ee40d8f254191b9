"""Tasks, the training loop, checkpoints and logs."""
