"""Studies of pruning: how saliencies, damping and Fisher estimates behave on a subject."""
