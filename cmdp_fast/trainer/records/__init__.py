"""The records of a run, from which it can be resumed: console, clock and metrics, checkpoints and the files of its end,
each with its sha256 (`cmdp_fast/digest.py`)."""
