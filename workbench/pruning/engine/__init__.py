"""What carries a pruning out: on single matrices, on heads and neurons, on whole dimensions."""
