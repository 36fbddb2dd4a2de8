"""Scales of input features, folded into the module before: the function stays, the model stays plain."""
