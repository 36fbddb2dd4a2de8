"""How far a fit can be trusted: certificate, intervals of parameters and of predictions, their coverage."""
