"""Inputs and the error criterion that the operation tests share."""

import os
from contextlib import contextmanager

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast import reference

DIFFERENTIABLE = ("logprob", "entropy", "reverse_kl", "forward_kl")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def poisoned_memory():
    """Memory that is allocated and not written holds NaN, or the largest integer, instead of what happens to be right.

    Of PyTorch's allocations that is all there are: the native modules allocate nothing that a tensor shows.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch fills in this mode only
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int64) == torch.iinfo(torch.int64).max
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


def here(value):
    """A CPU tensor on the device that the backend under test needs (see the fixture); anything else as it is."""
    on_cpu = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return value.to(torch.get_default_device()) if on_cpu else value


def make_logits(*shape, dtype=torch.float32, scale=3.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale + offset
    return here(values.to(dtype))


def make_tokens(*shape, vocab, seed=0):
    return here(torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed + 99), device="cpu"))


def weighted_sum(stats, weights):
    """A scalar that sends `weights[name]` upstream into each named statistic."""
    return sum((getattr(stats, name).double() * weight).sum() for name, weight in weights.items())


def finest(backend):
    """The widest dtype of logits that a backend takes, what it is exact to, and what ten given digits are worth."""
    if backend in ("triton", "cuda"):
        return torch.float32, 4e-7, 4e-7  # a few units in the last place of 1
    return torch.float64, 1e-15, 5e-9


def exact_and_eager(student, teacher, tokens, weights=None, **settings):
    """The reference in float64, and in the dtype that the library computes in; with weights, the gradients too."""
    outcomes = []
    for cast in (torch.Tensor.double, lambda t: t.to(reference.compute_dtype(student, teacher))):
        x = cast(student.detach()).requires_grad_()
        stats = reference.token_stats(x, cast(teacher.detach()), tokens, **settings)
        gradient = None
        if weights is not None:
            gradient = torch.autograd.grad(weighted_sum(stats, weights), x)[0]
        outcomes.append((stats, gradient))
    return outcomes


def assert_no_worse(ours, eager, exact, what="", *, size=1.0, terms=1):
    """Our error against float64 may not exceed eager PyTorch's in the same precision by more than rounding.

    Both are sums of rounded terms in different orders, so "no worse" means a factor of two, and for where eager happens
    to be exact eight units in the last place of `size`, the largest value or the largest of the terms whose difference
    it is. Float64 is summed in sequence: the rounding of `terms` additions adds up like a random walk.
    """
    exact, ours, eager = exact.detach().double(), ours.detach(), eager.detach()
    if not exact.numel():
        return
    units = 8 + (terms**0.5 if ours.dtype == torch.float64 else 0)
    rounding = units * torch.finfo(ours.dtype).eps * max(1.0, size, float(exact.abs().max()))
    error, allowed = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    limit = 2 * float(allowed.max()) + rounding
    assert float(error.max()) <= limit, f"{what}: error {float(error.max()):.3g} > {limit:.3g}"


def check_token_stats(student, teacher, tokens, backend, *, terms=1.0, **settings):
    """The statistics and their gradient, against the reference in float64 and in eager PyTorch.

    `terms`: the size in nats of the terms whose differences the statistics are.
    """
    weights = {name: make_logits(*tokens.shape, scale=1.0, seed=i) for i, name in enumerate(DIFFERENTIABLE)}
    x = student.detach().clone().requires_grad_()
    stats = cf.token_stats(x, teacher, tokens, backend=backend, **settings)
    gradient = torch.autograd.grad(weighted_sum(stats, weights), x)[0]
    exact, eager = exact_and_eager(student, teacher, tokens, weights, **settings)
    width = student.shape[-1]
    for name in stats._fields:
        values = (getattr(source, name) for source in (stats, eager[0], exact[0]))
        assert_no_worse(*values, name, size=terms, terms=width)
    assert gradient.dtype == student.dtype
    # The gradient of the reverse KL is a difference from R, which carries the rounding of R itself.
    size = float((exact[0].reverse_kl * weights["reverse_kl"]).abs().max()) / settings.get("temperature", 1.0)
    assert_no_worse(gradient, eager[1].to(student.dtype), exact[1], "gradient", size=size, terms=width)


def needs_memory(gigabytes):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return pytest.mark.skipif(available < gigabytes, reason=f"needs {gigabytes} GiB, {available:.0f} GiB are free")
