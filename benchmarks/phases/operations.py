"""Every operation on given logits, forward and backward: what the checks compare, and what profilers look at."""

from __future__ import annotations

import torch
from helpers import DIFFERENTIABLE, weighted_sum
from torch import Tensor

import cmdp_fast as cf

BUDGET = 5.0  # nats, of a completion


class Batch:
    """Random logits of rows that are tokens of a few completions, and what goes with them, on a device."""

    def __init__(
        self, rows: int, vocab: int, dtype: torch.dtype, device: str, *, storage: int = 0, masked: bool = False
    ) -> None:
        """``storage``: the columns of memory that a row takes, more than its vocabulary where it is not aligned."""
        generator = torch.Generator(device=device).manual_seed(rows + vocab)

        def normal(scale: float, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        width = max(storage, vocab)
        self.student, self.teacher = (normal(3.0, rows, width).to(dtype)[:, width - vocab :] for _ in range(2))
        self.tokens = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        self.reward = normal(1.0, rows)
        self.weights = {name: normal(1.0, rows) for name in DIFFERENTIABLE}
        self.mask = torch.rand(rows, generator=generator, device=device) > 0.4 if masked else None
        ends = sorted({0, 1, rows // 3, rows})  # completions of several lengths
        self.cu_seqlens = torch.tensor(ends, device=device)

    def statistics(self, backend: str | None, inplace: bool = False, **settings: object) -> dict[str, Tensor]:
        """The six statistics, and the gradient of a weighted sum of those that have one."""
        x = self.student.detach().clone() if inplace else self.student.detach()
        x.requires_grad_()
        settings |= {"mask": self.mask, "inplace_backward": inplace, "backend": backend}
        stats = cf.token_stats(x, self.teacher, self.tokens, **settings)
        gradient = torch.autograd.grad(weighted_sum(stats, self.weights), x)[0]
        return {name: t.detach() for name, t in stats._asdict().items()} | {"gradient": gradient}

    def constrained(self, backend: str | None) -> dict[str, Tensor]:
        """Statistics, trace and reward of the packed completions, and the gradient of the reverse KL."""
        x = self.student.detach().requires_grad_()
        settings = {"mask": self.mask, "cu_seqlens": self.cu_seqlens, "backend": backend}
        out = cf.constrained_reward(x, self.teacher, self.tokens, self.reward, BUDGET, **settings)
        gradient = torch.autograd.grad((out.stats.reverse_kl * self.weights["reverse_kl"]).sum(), x)[0]
        found = {name: t.detach() for name, t in out.stats._asdict().items()}
        return found | out.trace._asdict() | {"reward": out.reward, "gradient": gradient}

    def in_turn(self, backend: str | None) -> dict[str, Tensor]:
        """What `constrained` promises to equal, bit for bit: the three operations one after another."""
        settings = {"mask": self.mask, "backend": backend}
        stats = cf.token_stats(self.student, self.teacher, self.tokens, **settings)
        settings["cu_seqlens"] = self.cu_seqlens
        trace = cf.budget_trace(stats.reverse_kl, BUDGET, **settings)
        reward = cf.modified_reward(self.reward, stats.reverse_kl, trace, **settings)
        return stats._asdict() | trace._asdict() | {"reward": reward}

    def mixture(self, backend: str | None) -> dict[str, Tensor]:
        """A Jensen-Shannon divergence and its gradient."""
        x = self.student.detach().requires_grad_()
        value = cf.divergence(x, self.teacher, "jsd", beta=0.3, mask=self.mask, backend=backend)
        weight = self.weights["forward_kl"]
        return {"jsd": value.detach(), "gradient": torch.autograd.grad((value * weight).sum(), x)[0]}

    def linear(self, backend: str | None, hidden: int = 64) -> dict[str, Tensor]:
        """Statistics from hidden states, and the gradients of these and of the head."""
        (rows, vocab), device = self.student.shape, self.student.device
        generator = torch.Generator(device=device).manual_seed(hidden)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * hidden**-0.25).to(self.student.dtype)

        h, w, g, u = normal(rows, hidden), normal(vocab, hidden), normal(rows, hidden), normal(vocab, hidden)
        h, w = h.requires_grad_(), w.requires_grad_()
        stats = cf.linear_token_stats(h, w, g, u, self.tokens, mask=self.mask, backend=backend)
        of_hidden, of_head = torch.autograd.grad(weighted_sum(stats, self.weights), (h, w))
        found = {name: t.detach() for name, t in stats._asdict().items()}
        return found | {"hidden": of_hidden, "head": of_head}

    def all(self, backend: str) -> None:
        """Everything that a backend has a kernel for, once."""
        self.statistics(backend)
        self.statistics(backend, inplace=True)
        self.constrained(backend)
        self.in_turn(backend)
        if backend != "cuda":  # which has no kernel for these
            self.mixture(backend)
            self.linear(backend)
