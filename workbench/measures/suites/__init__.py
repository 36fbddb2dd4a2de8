"""Tasks of the lm-evaluation-harness on subjects: who answers, from which files, and what a change cost."""
