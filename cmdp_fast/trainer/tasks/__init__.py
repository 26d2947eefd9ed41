"""The task of a run: its problems (`data.py`), and the rewards, step verifiers and judges of completions."""
