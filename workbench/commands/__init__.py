"""The commands of `workbench`, one a file; `workbench.cli` imports only the one that is asked for."""
