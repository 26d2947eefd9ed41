"""`cmdp-fast train`: a minimal constrained PPO trainer. Start with `step.py`, one step, and `run.py`, the job.

Methods, settings, the files of a run, memory, and the order of the modules: README.md, beside this file.
"""
