"""Hidden states and heads of a small pair of models, and the comparison with logits that are made in full."""

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, make_logits, make_tokens, weighted_sum

import cmdp_fast as cf
from cmdp_fast import reference
from cmdp_fast.ops import tile_size

PARTS = ("student_hidden", "student_weight", "student_bias")


def make_inputs(*, rows, vocab, hidden=(12, 20), student=torch.float32, teacher=torch.float32, biased=False):
    """Arguments of `linear_token_stats` by name; logits are of the size of a language model's."""
    inputs = {"tokens": make_tokens(*rows, vocab=vocab)}
    for seed, (model, width, dtype) in enumerate((("student", hidden[0], student), ("teacher", hidden[1], teacher))):
        inputs[f"{model}_hidden"] = make_logits(*rows, width, dtype=dtype, scale=1.5, seed=seed)
        inputs[f"{model}_weight"] = make_logits(vocab, width, dtype=dtype, scale=2 / width**0.5, seed=10 + seed)
        if biased:
            inputs[f"{model}_bias"] = make_logits(vocab, dtype=dtype, scale=1.0, seed=20 + seed)
    return inputs


def perturbed(inputs, mask):
    """The same where the mask is True, something unusable elsewhere."""
    spoilt = dict(inputs)
    for name in ("student_hidden", "teacher_hidden"):
        spoilt[name] = inputs[name].masked_fill(~mask.unsqueeze(-1), torch.nan)
    spoilt["tokens"] = inputs["tokens"].masked_fill(~mask, -7)
    return spoilt


def evaluate(function, inputs, *, present=DIFFERENTIABLE, cast=None, **options):
    """Statistics, and the gradients of the student's parts from random upstream gradients into `present`."""
    given = {name: t if cast is None or not t.is_floating_point() else t.to(cast) for name, t in inputs.items()}
    leaves = {name: given[name].clone().requires_grad_() for name in PARTS if name in given}
    stats = function(**{**given, **leaves}, **options)
    weights = {name: make_logits(*(stats.logprob.shape or (1,)), scale=1.0, seed=i) for i, name in enumerate(present)}
    gradients = torch.autograd.grad(weighted_sum(stats, weights), list(leaves.values()))
    return stats, dict(zip(leaves, gradients, strict=True))


def gradient_size(inputs, exact, present, options):
    """The largest terms that a gradient sums: that of the reverse KL is a difference from R."""
    logits = 1.0
    if "reverse_kl" in present and exact.reverse_kl.numel():
        upstream = make_logits(*(exact.reverse_kl.shape or (1,)), scale=1.0, seed=present.index("reverse_kl"))
        flowing = (exact.reverse_kl * upstream).detach().abs().max().item()
        logits = max(logits, flowing / options.get("temperature", 1.0) * abs(options.get("student_scale", 1.0)))
    factor = {"student_hidden": "student_weight", "student_weight": "student_hidden", "student_bias": None}
    return {
        name: logits * (1.0 if other is None or not inputs[other].numel() else inputs[other].abs().max().item())
        for name, other in factor.items()
    }


def distance(inputs, options):
    """How far, in nats, a row's logits stand above the reference of its sums at most: the largest of its first tile,
    which is no smaller than its first column, and 16 nats more at most (csrc/cpu/forward.h). Entropies and divergences
    are differences of terms of that size."""
    far = 0.0
    for model in ("student", "teacher"):
        named = {name: value.double() for name, value in inputs.items() if name.startswith(model)}
        scale = options.get(f"{model}_scale", 1.0) / options.get("temperature", 1.0)
        logits = named[f"{model}_hidden"] @ named[f"{model}_weight"].T * scale
        if f"{model}_bias" in named:
            logits = logits + named[f"{model}_bias"] * scale
        if logits.numel():
            above = (logits - logits[..., :1]).nan_to_num(0.0, 0.0, 0.0)
            far = max(far, float(above.max()))
    return min(far, 16.0)


def check(inputs, backend, *, present=DIFFERENTIABLE, **options):
    """Ours against float64, measured by eager PyTorch's error in the precision that the library computes in."""
    ours, gradients = evaluate(cf.linear_token_stats, inputs, present=present, backend=backend, **options)
    heads = [value for name, value in inputs.items() if "hidden" in name or "weight" in name]
    computed = reference.compute_dtype(*heads)
    exact, exact_gradients = evaluate(
        reference.linear_token_stats, inputs, present=present, cast=torch.float64, **options
    )
    eager, eager_gradients = evaluate(reference.linear_token_stats, inputs, present=present, cast=computed, **options)
    terms = inputs["student_weight"].shape[0]
    size = gradient_size(inputs, exact, present, options)
    for name, got in ours._asdict().items():
        assert got.dtype == computed
        of_terms = 1.0 if name.endswith("logprob") else distance(inputs, options)
        assert_no_worse(got, getattr(eager, name), getattr(exact, name), name, size=of_terms, terms=terms)
    for name, got in gradients.items():
        assert got.dtype == inputs[name].dtype and got.shape == inputs[name].shape
        assert_no_worse(
            got, eager_gradients[name].to(got.dtype), exact_gradients[name], name, size=size[name], terms=terms
        )
    return ours, gradients


def set_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Rows of a tile and the unit of its columns, on any device; the area is as small as it gets."""
    for name, value in (("ROWS", rows), ("GPU_ROWS", rows), ("COLUMNS", columns), ("GPU_COLUMNS", columns)):
        monkeypatch.setattr(tile_size, name, value)
    monkeypatch.setenv("CMDP_FAST_TILE_BYTES", "1")
