"""`cmdp-fast bench`: speed, memory and error of the operations beside those of other libraries, in one run.

A `Case` is an operation at a shape and dtype, a `Variant` one implementation of it: ours, or a peer's behind an adapter
(`peers/`). `ops/` says, an operation a file, what a case must move and compute, makes its inputs and knows its value in
float64. `suite.py` checks the variants, times all of them in turn beside the floors of the machine, and measures memory
in fresh processes; `results.py` holds what came out, which tables, plots and pages only read.
"""
