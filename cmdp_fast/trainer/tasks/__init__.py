"""What a run learns from: the problems (`data.py`), and what judges completions: rewards, step verifiers, judges."""
