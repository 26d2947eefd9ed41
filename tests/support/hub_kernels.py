"""The folder of `cmdp_fast.hub_kernel`, loaded with the Hub's package `kernels`, and calls of its three operations.

That package is not among the requirements of the tests: transformers 5.0, the oldest allowed, cannot be imported beside
it. Where it is not installed, its own steps are done here; .ci/run does both.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cmdp_fast.hub_kernel.folder import write

WIDTHS = (16, 24)  # of the models
VOCAB = 61

# By the installation: to an import the folder tests/kernels is a package of this name.
INSTALLED = any(importlib.metadata.distributions(name="kernels"))


def loaded(folder: Path) -> ModuleType:
    """The module that `kernels` makes of a folder written now. It asks nobody: no metadata names another kernel."""
    write(folder)
    if not INSTALLED:
        return _as_kernels_does(folder / "build" / "torch-cpu")
    import kernels

    return kernels.get_local_kernel(folder, backend="cpu")


def _as_kernels_does(build: Path) -> ModuleType:
    """A build as a module under its id, which is no name that an import could find (kernels 0.17.2, importer.py)."""
    identity = json.loads((build / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(identity, build / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module
    spec.loader.exec_module(module)
    return module


def token_stats(package: Any, backend: str) -> list[Tensor]:
    """All that an operation gives: the statistics and the gradient of the student's logits."""
    student, teacher, tokens, mask, _ = _given()
    stats = package.token_stats(student, teacher, tokens, mask=mask, temperature=0.8, backend=backend)
    return [*stats, *torch.autograd.grad(_loss(stats), [student])]


def linear_token_stats(package: Any, backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, teacher_hidden = (torch.randn(3, 6, width, generator=generator) for width in WIDTHS)
    head, teacher_head = (torch.randn(VOCAB, width, generator=generator) / width**0.5 for width in WIDTHS)
    bias = torch.randn(VOCAB, generator=generator)
    _, _, tokens, mask, _ = _given()
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]
    student = package.Head(head, bias=bias, softcap=30.0)
    stats = package.linear_token_stats(
        hidden, student, teacher_hidden, teacher_head, tokens, mask=mask, backend=backend
    )
    return [*stats, *torch.autograd.grad(_loss(stats), leaves)]


def constrained_reward(package: Any, backend: str) -> list[Tensor]:
    student, teacher, tokens, mask, reward = _given()
    constraint = package.Constraint(budget=2.0)
    out = package.constrained_reward(
        student, teacher, tokens, reward, constraint=constraint, mask=mask, backend=backend
    )
    return [*out.stats, *out.trace, out.reward, *torch.autograd.grad(_loss(out.stats), [student])]


OPERATIONS: list[Callable[[Any, str], list[Tensor]]] = [token_stats, linear_token_stats, constrained_reward]


def _given() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 6, VOCAB, generator=generator) for _ in range(2))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    tokens, reward = torch.randint(VOCAB, (3, 6), generator=generator), torch.randn(3, 6, generator=generator)
    return student.requires_grad_(), teacher, tokens, mask, reward


def _loss(stats: Any) -> Tensor:
    return (stats.logprob + 0.5 * stats.entropy + 2 * stats.reverse_kl - stats.forward_kl).sum()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two calls gave the same bits."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
