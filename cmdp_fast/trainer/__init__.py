"""`cmdp-fast train`: a minimal constrained PPO trainer. Start with `methods/ppo.py`, the step, and `run.py`, the job.

Methods, settings, the files of a run and what to do about memory: README.md, beside this file.
"""
