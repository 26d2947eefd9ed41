"""The phases of `benchmarks/gpu.py`: `prove`, `logits`, `linear` and `train`, and what they share."""
