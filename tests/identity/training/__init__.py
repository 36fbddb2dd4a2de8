"""Optimizers, schedules and batches beside others' code."""
