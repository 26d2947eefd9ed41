"""Calls of the public functions that lead to every operator there is, and the operators' own arguments in them."""

import torch
from helpers import make_logits, make_tokens
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.ops.arguments import flatten
from cmdp_fast.ops.operator import Operator


def inputs():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    x, y = make_logits(3, 5, 37).requires_grad_(), make_logits(3, 5, 37, seed=1)
    return x, y, make_tokens(3, 5, vocab=37), mask, make_logits(3, 5, scale=1.0, seed=2)


def call_everything(group):
    """Calls of the public functions that lead to every operator there is."""
    x, y, tokens, mask, reward = inputs()
    cf.token_stats(x, y, tokens, mask=mask).reverse_kl.sum().backward()
    cf.token_stats(x * 1, y, tokens, mask=mask, inplace_backward=True).entropy.sum().backward()
    cf.token_stats(x, y, tokens, vocab_size=37, process_group=group).logprob.sum().backward()
    cf.divergence(x, y, mask=mask).sum().backward()
    cf.constrained_reward(x, y, tokens, reward, 1.5, mask=mask).stats.forward_kl.sum().backward()
    cf.constrained_reward(x, y, tokens, reward, 1.5, cost="jsd", mask=mask)
    trace = cf.budget_trace(reward.abs(), 1.0, mask=mask)
    cf.modified_reward(reward, reward.abs(), trace, mask=mask)
    hidden, head = make_logits(3, 5, 8, seed=3).requires_grad_(), make_logits(37, 8, seed=4).requires_grad_()
    cf.linear_token_stats(hidden, head, y[..., :6], make_logits(37, 6), tokens).reverse_kl.sum().backward()
    cf.linear_divergence(hidden, head, y[..., :6], make_logits(37, 6), mask=mask).sum().backward()
    likeliest = y.detach().log_softmax(-1).topk(4)
    cf.topk_stats(x, likeliest.indices, likeliest.values, tokens, mask=mask).forward_kl.sum().backward()
    cf.linear_topk_stats(hidden, head, likeliest.indices, likeliest.values, tokens).reverse_kl.sum().backward()
    cf.TokenState.empty(15).update(x.flatten(0, 1), y.flatten(0, 1), tokens.flatten())


def recorded(monkeypatch, group):
    """Every operator that they call, what it is given, and whether gradients are on there."""
    calls, straight = [], Operator.__call__

    def remember(operator, given):
        calls.append((operator, copied(operator, given), torch.is_grad_enabled()))
        return straight(operator, given)

    with monkeypatch.context() as patch:
        patch.setattr(Operator, "__call__", remember)
        call_everything(group)
    return calls


def copied(operator, given):
    """The same arguments in memory of their own, with the needs for gradients that they have."""
    flat = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in flatten(given)]
    return operator.takes.rebuild(flat)
