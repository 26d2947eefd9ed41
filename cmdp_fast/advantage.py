"""Advantages: what a completion or a token is worth compared with others, and the number that it was divided by.

Pure functions of small tensors, none of them differentiable. B completions stand in contiguous groups of one prompt
each; tokens are padded to [B, T] with a boolean ``mask`` (None: all are real). Where advantages are divided by a number
the direct term of the loss has to share it (`cmdp_fast.objective`), so that number is part of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmdp_fast.field_docs import documented
from cmdp_fast.padded import as_given, discounted, following, kept_tokens, suffix_scan, wide


def _groups(x: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a group baseline needs at least 2 completions of a prompt")
    if x.shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {x.shape[0]} sequences of the batch")
    return wide(x.detach()).unflatten(0, (-1, group_size))


def _compared(groups: Tensor, scored: Tensor | None) -> Tensor | None:
    """Whom the members of each group are compared with, bool [G, size, ...]: its scored ones, or all where it has none.
    None: all of every group."""
    if scored is None:
        return None
    if scored.dtype != torch.bool:
        raise TypeError(f"scored has dtype {scored.dtype}, expected torch.bool")
    size = groups.shape[:2]
    if scored.shape != (size.numel(),):
        raise ValueError(f"scored has shape {tuple(scored.shape)}, expected ({size.numel()},)")
    members = scored.view(size)
    members = members | ~members.any(1, keepdim=True)
    return members.view(*size, *(1 for _ in groups.shape[2:])).expand_as(groups)


def _mean(groups: Tensor, compared: Tensor | None) -> Tensor:
    """Of the compared members of each group; dim 1 is kept."""
    if compared is None:
        return groups.mean(1, keepdim=True)
    return torch.where(compared, groups, 0.0).sum(1, keepdim=True) / compared.sum(1, keepdim=True)


def _divisor(groups: Tensor, compared: Tensor | None, eps: float) -> Tensor:
    """Deviation + eps of the compared members of each group; dim 1 is kept. 1 where a single one has no deviation."""
    if compared is None:
        return groups.std(1, keepdim=True) + eps
    freedom = compared.sum(1, keepdim=True) - 1
    off = torch.where(compared, groups - _mean(groups, compared), 0.0)
    deviation = (off.square().sum(1, keepdim=True) / freedom).sqrt()
    return torch.where(freedom > 0, deviation + eps, 1.0)


def _leave_one_out(groups: Tensor, scored: Tensor | None) -> Tensor:
    """x less the mean of the other members of its group (dim 1) that are compared; 0 where there are none."""
    compared = _compared(groups, scored)
    off = groups - _mean(groups, compared)
    if compared is None:
        size = groups.shape[1]
        return off * (size / (size - 1))
    number = compared.sum(1, keepdim=True).to(groups.dtype)
    return off * torch.where(compared, number / (number - 1).clamp(min=1), 1.0)  # one that is not is in no mean


@documented
class GroupAdvantage(NamedTuple):
    """What `grpo` returns, [B] each; from `whiten`, advantages [B, T] and one scale."""

    advantage: Tensor
    """What each completion, or token, is worth compared with the others: [B], or [B, T] from `whiten`; detached."""
    scale: Tensor
    """What it was divided by, and the direct term has to be: [B], or a scalar from `whiten`; detached."""


def grpo(returns: Tensor, group_size: int, eps: float = 1e-4, *, scored: Tensor | None = None) -> GroupAdvantage:
    """(S_i - mean) / (std + eps) over contiguous groups, std with ddof 1; ``returns`` and both results are [B].

    Divide `direct_coefficient` by ``scale[:, None]`` too, or the discrepancy weight changes its meaning with the spread
    of the returns. A group whose returns take two values has, up to eps, the same advantages at every distance between
    them: where feasible completions score 1 and the others -n, it is indifferent to n. In a group of equal returns only
    the direct term acts, and with scale = eps it is multiplied by 1/eps (10,000). `rloo` neither forgets n nor
    rescales.

    ``scored`` [B] bool, for a task that has no reward for some completions: mean and deviation are those of the
    group's scored ones, and the others are compared with them. A group without any is one in which all are; where a
    single one is scored there is no deviation, and the scale is 1.
    Raises ValueError if group_size < 2 or does not divide B or ``scored`` is not [B], TypeError if it is not bool.

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300).
    """
    groups = _groups(returns, group_size)
    compared = _compared(groups, scored)
    scale = _divisor(groups, compared, eps).expand_as(groups)
    advantage = (groups - _mean(groups, compared)) / scale
    return GroupAdvantage(as_given(returns, advantage.flatten(0, 1)), as_given(returns, scale.flatten(0, 1)))


def rloo(returns: Tensor, group_size: int, *, scored: Tensor | None = None) -> Tensor:
    """S_i less the mean of the group's other returns, [B]; contiguous groups, no normalisation, unbiased.

    In a group of equal returns only the direct term acts. ``scored`` as for `grpo`: the mean is that of the others that
    are scored, and the only one that is scored is worth 0. Raises as `grpo` does.

    Source: RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    """
    return as_given(returns, _leave_one_out(_groups(returns, group_size), scored).flatten(0, 1))


def position_rloo(
    score: Tensor, group_size: int, mask: Tensor | None = None, *, scored: Tensor | None = None
) -> Tensor:
    """The leave-one-out baseline at each position: `score_coefficient` [B, T] less the mean over the group's other
    completions at the same position, where a completion that has finished counts as 0.

    Column t has to be the t-th completion token of every sequence. Unbiased, as it comes from other samples; it knows
    how much of the return is still to come. ``scored`` [B] as for `rloo`. Raises as `grpo` does.
    """
    keep = kept_tokens(score, mask)
    groups = _groups(torch.where(keep, score, 0.0), group_size)
    return as_given(score, torch.where(keep, _leave_one_out(groups, scored).flatten(0, 1), 0.0))


def gae(
    reward: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    beyond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantage, target) [B, T], with target = advantage + value.

    ``value`` is V(s_t), before the action. An action-independent cost at t is part of what V(s_t) predicts, so the
    modified reward serves as it is. Masked tokens are stepped over: the next value is that of the next real token.
    ``beyond`` [B] is V_{T+1}, after the last real token, of sequences that were cut off and would go on; 0 for one that
    has ended, and None for all. ``lam`` 1 is the return less the value; with less, a reward reaches
    a token n before it times (gamma lam)^n, and 0.95 takes it from the first of 1000 tokens.
    The advantage is not whitened, as other libraries' is: that divides it by a number, which the direct term has to
    share. `whiten` does both; the target is made of the advantage before that.
    Raises TypeError, ValueError for a mask or shapes that do not fit.

    Source: Schulman et al. 2016, arXiv 1506.02438, equation 16.
    """
    keep = kept_tokens(reward, mask, value=value)
    if beyond is not None and beyond.shape != reward.shape[:1]:
        raise ValueError(f"beyond has shape {tuple(beyond.shape)}, expected {tuple(reward.shape[:1])}")
    value = wide(torch.where(keep, value.detach(), 0.0))
    after = following(suffix_scan(value, torch.where(keep, value.new_zeros(()), 1.0)))
    if beyond is not None:
        ends = following(keep.long()).flip(1).cumsum(1).flip(1) == 0  # no real token follows
        after = torch.where(ends, beyond.detach()[:, None], after)
    delta = torch.where(keep, reward.detach() + discounted(gamma, after) - value, 0.0)
    advantage = suffix_scan(delta, torch.where(keep, delta.new_tensor(gamma * lam), 1.0))
    advantage = torch.where(keep, advantage, 0.0)
    return as_given(reward, advantage), as_given(reward, advantage + value)


def whiten(advantage: Tensor, *, mask: Tensor | None = None) -> GroupAdvantage:
    """(A - mean) / scale over the real tokens of a batch, [B, T], and the scale, a scalar tensor.

    scale = sqrt(variance + 1e-8) with ddof 1, as PPO in TRL and verl. Divide `direct_coefficient` by it too, or the
    discrepancy weight changes its meaning with the spread of the advantages. A batch with less than two real tokens has
    no spread: its scale is 1. Processes that share a step have to whiten their tokens together. Raises TypeError,
    ValueError for a mask or shapes that do not fit.
    """
    keep = kept_tokens(advantage, mask)
    count = keep.sum()
    real = wide(torch.where(keep, advantage.detach(), 0.0))
    centred = torch.where(keep, real - real.sum() / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    scale = torch.where(count > 1, (variance + 1e-8).sqrt(), 1.0)
    return GroupAdvantage(as_given(advantage, centred / scale), as_given(advantage, scale))
