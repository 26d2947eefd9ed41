"""What a run leaves, and how another begins from it: console, clock and metrics, checkpoints and the files of the end,
each known again by its sha256 (`digest.py`)."""
