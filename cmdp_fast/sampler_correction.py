"""Completions that another sampler than the policy has drawn: importance weights for the gradient and for estimates.

A server samples with other kernels, in another precision, perhaps with weights of a step ago: not from pi, the policy
as the trainer scores it before its update, but from some mu, whose log-probabilities it reports. An expectation over pi
is one over mu of what is weighted by pi/mu:

    token        w_t = min(pi/mu, clip) of the token alone. It multiplies the score term. States, the costs of which are
                 functions, and what follows a token are still mu's: a bias of first order in the difference, at a
                 variance that does not grow with the length.
    sequence     w = min(prod_t pi/mu, clip) of the completion. It multiplies both terms of the gradient (the module
                 docstring of `cmdp_fast.objective`), which without a clip that takes effect are then exactly those of
                 pi. Its variance grows with the length.
    estimates    sum w x / sum w, with the truncated weight of the completion in either mode: the mean cost of a
                 completion is a number per completion.

Truncation bounds the variance and biases towards mu where mu is too rare. What mu never draws, such as what top-k or
top-p leave out, stays out: weights are then those of pi without it. A weight is at least 0 and a constant, so it
multiplies what `ppo_loss` is linear in: the ``advantage``, and ``direct`` where it is the completion's.

Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated importance
sampling between a sampler's and a trainer's log-probabilities), as in TRL's ``token_truncate`` and
``sequence_truncate``; the truncated weights are those of Ionides 2008 and of V-trace (Espeholt et al. 2018,
arXiv 1802.01561). The ratio to the policy before the update stays PPO's own: pi is the proximal policy, mu the
behaviour, as in the decoupled objective of Hilton et al. 2022 (arXiv 2110.00641).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cmdp_fast.padded import kept_tokens

LARGEST = 1e30  # of a log-ratio: sums of them stay finite


def sampler_log_ratio(logprob: Tensor, sampler_logprob: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """log pi/mu of each token, [B, T] in nats, detached, at least float32; 0 where masked.

    ``logprob`` is that of the policy before its update, ``sampler_logprob`` what the sampler reports of the
    distribution that it has drawn from, after its temperature. A token that pi excludes has -inf, so a weight of 0. A
    ``sampler_logprob`` of NaN is not known, and gives 0. Raises ValueError for shapes that differ.
    """
    keep = kept_tokens(logprob, mask, sampler_logprob=sampler_logprob)
    logprob, drawn = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (logprob, sampler_logprob))
    known = keep & ~drawn.isnan()
    excluded = logprob == -torch.inf  # by mu as well, if it says so: still no token of pi's
    return torch.where(known, torch.where(excluded, logprob, (logprob - drawn).clamp(max=LARGEST)), 0.0)


def sampler_weight(log_ratio: Tensor, mode: Literal["token", "sequence"], *, clip: float = 2.0) -> Tensor:
    """The weights of tokens [B, T], or of completions [B, 1], in [0, clip], from `sampler_log_ratio` [B, T].

    A token's multiplies the advantage, a completion's the advantage and the direct coefficient. An infinite ``clip``
    truncates nothing. Raises ValueError for another mode and for a clip below 1, which would truncate what needs no
    correction.
    """
    if mode not in ("token", "sequence"):
        raise ValueError(f"mode is {mode!r}, expected 'token' or 'sequence'")
    return _truncated(log_ratio if mode == "token" else log_ratio.sum(1, keepdim=True), clip).exp()


def estimate_weight(log_ratio: Tensor, *, mask: Tensor | None = None, clip: float = 2.0) -> Tensor:
    """The truncated weights of completions [B] for `weighted_mean`, from `sampler_log_ratio` [B, T] of all of them.

    They are divided by the largest, of which a mean knows nothing: however small all of them are, one is 1. A
    completion without a token has weight 0. NaN where the policy excludes every completion, so that nothing is known of
    it.
    """
    keep = kept_tokens(log_ratio, mask)
    whole = torch.where(keep, log_ratio, 0.0).sum(1)
    log_weight = _truncated(whole, clip).masked_fill(~keep.any(1), -torch.inf)
    return (log_weight - log_weight.max()).exp() if len(log_weight) else log_weight


def _truncated(log_weight: Tensor, clip: float) -> Tensor:
    if not clip >= 1.0:
        raise ValueError(f"clip is {clip}, expected at least 1")
    return log_weight.clamp(max=math.log(clip))


def weighted_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum w x / sum w of some values [B], a scalar; the mean without weights. A value of weight 0 may be infinite."""
    if weight is None:
        return values.mean()
    return torch.where(weight != 0, weight * values, 0.0).sum() / weight.sum()


def sampler_metrics(
    log_ratio: Tensor,
    *,
    mask: Tensor,
    mode: Literal["token", "sequence"] | None = None,
    clip: float = 2.0,
) -> dict[str, Tensor]:
    """What a run reports of its sampler, scalar tensors, from `sampler_log_ratio` [B, T] of all completions.

    TRL's names: ``sampling/sampling_logp_difference/mean`` and ``/max``, over tokens, in nats; with a ``mode`` also
    ``sampling/importance_sampling_ratio/min``, ``/mean`` and ``/max`` of its weights. In their style:
    ``sampling/importance_sampling_ratio/clipped_ratio``, the share of the weights that the clip has truncated, and
    ``sampling/effective_sample_ratio``, (sum w)^2 / (n sum w^2) of the completions' weights: the share of n completions
    that are left for an estimate. NaN where there is no token.
    """
    keep = kept_tokens(log_ratio, mask)
    log_ratio = torch.where(keep, log_ratio, 0.0)
    difference, none = log_ratio.abs(), log_ratio.new_tensor(torch.nan)
    metrics = {
        "sampling/sampling_logp_difference/mean": difference.sum() / keep.sum(),
        "sampling/sampling_logp_difference/max": torch.where(keep.any(), difference.max(), none)
        if keep.numel()
        else none,
    }
    if mode is None:
        return metrics
    real = keep.any(1)
    of = log_ratio[keep] if mode == "token" else log_ratio[real].sum(1)
    weight, whole = _truncated(of, clip).exp(), estimate_weight(log_ratio[real], clip=clip)
    return metrics | {
        "sampling/importance_sampling_ratio/min": weight.min() if len(weight) else none,
        "sampling/importance_sampling_ratio/mean": weight.mean(),
        "sampling/importance_sampling_ratio/max": weight.max() if len(weight) else none,
        "sampling/importance_sampling_ratio/clipped_ratio": (of > math.log(clip)).to(of.dtype).mean(),
        "sampling/effective_sample_ratio": whole.sum().square() / (len(whole) * whole.square().sum()),
    }
