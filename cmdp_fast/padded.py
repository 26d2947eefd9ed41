"""Sequences padded to [B, T] with a boolean mask: which tokens count, the last and the next of them, scans, dtypes."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_tokens(like: Tensor, mask: Tensor | None, **others: Tensor) -> Tensor:
    """The mask as a [B, T] tensor, after checking that everything has the shape of ``like``."""
    if like.dim() != 2:
        raise ValueError(f"expected padded [B, T] tensors, got shape {tuple(like.shape)}")
    for name, other in others.items():
        if other.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, expected {tuple(like.shape)}")
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(like.shape)}")
    return mask


def last_kept(x: Tensor, keep: Tensor) -> Tensor:
    """x at the last token that is kept, [B, 1]; at column 0 where a row keeps none, and 0 where it has no column."""
    if not x.shape[1]:
        return x.new_zeros(len(x), 1)
    position = torch.arange(x.shape[1], device=x.device)
    return x.gather(1, torch.where(keep, position, 0).amax(1, keepdim=True))


def following(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def suffix_scan(x: Tensor, factor: Tensor) -> Tensor:
    """y_t = x_t + factor_t y_{t+1}, y_{T+1} = 0, in log2(T) steps on whole tensors instead of T on columns.

    A pair (x, factor) stands for the map y -> x + factor y; composing neighbours, then neighbours' neighbours, and so
    on doubles the span that each position covers. No power of a discount is ever divided by. One may underflow, so the
    factors say by themselves how far an infinite amount reaches: to where one of them is 0.
    """
    reaches, step = factor != 0, 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :-step] + weighed(factor[:, :-step], x[:, step:], reaches[:, :-step]), x[:, -step:]], dim=1)
        factor = torch.cat([factor[:, :-step] * factor[:, step:], factor[:, -step:]], dim=1)
        reaches = torch.cat([reaches[:, :-step] & reaches[:, step:], reaches[:, -step:]], dim=1)
        step *= 2
    return x


def weighed(weight: Tensor, amount: Tensor, counts: Tensor) -> Tensor:
    """weight * amount for weights >= 0 of what ``counts``, else 0: an infinite amount is itself, however small its
    weight has become, and 0 of it is nothing."""
    return torch.where(counts, torch.where(amount.isinf(), amount, weight * amount), 0.0)


def discounted(gamma: float, amount: Tensor) -> Tensor:
    """gamma * amount; 0 of an infinite amount is nothing."""
    return gamma * amount if gamma else torch.zeros_like(amount)


def wide(x: Tensor) -> Tensor:
    """In float32 at least: a half-precision number holds neither a discount, nor an epsilon, nor a sum of squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_given(given: Tensor, result: Tensor) -> Tensor:
    """A result in the dtype of the argument that it is of; of integers as it is."""
    return result.to(given.dtype) if given.is_floating_point() else result
