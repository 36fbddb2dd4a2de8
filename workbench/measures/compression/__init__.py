"""The compression report: which runs it makes, its figures of nearness, and what it concludes."""
