"""Run tables: their schema, their checks, and the files of other tools that hold them."""
