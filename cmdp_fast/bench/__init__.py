"""`cmdp-fast bench`: speed, memory and error of the operations beside those of other libraries, in one run.

A `Case` is an operation at a shape and dtype. A `Variant` is one implementation of it: ours, or a peer's behind an
adapter (`peers/`). `ops/` has one file per operation: the work that a case cannot avoid, its inputs, and its value in
float64. `suite.py` checks the variants, times all of them in turn beside the floors of the machine, and has `memory.py`
measure memory in fresh processes. `results.py` holds the outcome; tables, plots and pages only read it.
"""
