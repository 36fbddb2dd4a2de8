"""Traces and spectra beside others' code."""
