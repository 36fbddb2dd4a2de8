"""Sweeps: search over hyperparameters, their ledger of trials and the objective that a trial trains."""
