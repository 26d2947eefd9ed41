"""The folder that the Hub's `kernels` package loads three operations from, made of this package's own sources.

    python -m cmdp_fast.hub_kernel FOLDER

writes it; `cmdp_fast/guide/hub_kernel.md` says what is in it and how it is used. Nothing is uploaded. The folder holds
Python alone: Triton kernels for NVIDIA's GPUs and plain PyTorch for everything else.
"""
