"""Studies of training: single runs, comparisons, and what learning rate and batch size do to the loss."""
