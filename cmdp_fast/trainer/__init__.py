"""`cmdp-fast train`: a minimal constrained PPO trainer. Start with `ppo.py`, the step, and `run.py`, the job."""
