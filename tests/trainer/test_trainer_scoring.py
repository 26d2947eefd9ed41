"""How the trainer gets from outputs to statistics, and what it says of a model whose head is not known."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_pair import tiny_model
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.scoring import FromHiddenStates, FromLogits, make_scoring


class Doubled(LlamaForCausalLM):
    """A model that does something to its logits that no configuration mentions."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_head_that_is_not_known_is_refused_with_the_way_out(tmp_path):
    folder = tiny_model(tmp_path, seed=1)
    plain, doubled = (kind.from_pretrained(folder) for kind in (LlamaForCausalLM, Doubled))
    with pytest.raises(InputError, match=r"teacher: Doubled does something to its logits.*--logits full"):
        make_scoring("tiled", (plain, doubled), 10, 1.0)
    assert isinstance(make_scoring("full", (plain, doubled), 10, 1.0), FromLogits)
    assert isinstance(make_scoring("tiled", (plain, plain), 10, 1.0), FromHiddenStates)


def test_half_precision_hidden_states_meet_the_head_in_half_precision(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, seed=1))
    weight = cf.head_of(model).weight
    hidden = torch.randn(2, 3, weight.shape[1]).bfloat16()
    tokens, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    scoring = FromHiddenStates(vocab_size=len(weight), temperature=1.0)
    stats = scoring.token_stats((model, model), (hidden, hidden.flip(0)), tokens, mask)
    half = weight.bfloat16()
    assert not torch.equal(half.float(), weight)
    for got, want in zip(stats, cf.linear_token_stats(hidden, half, hidden.flip(0), half, tokens), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_divergence_from_hidden_states_is_that_of_the_logits(tmp_path, beta):
    models = tuple(AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / str(s), seed=s)) for s in (1, 2))
    heads = [cf.head_of(model) for model in models]
    outputs = tuple(torch.randn(2, 3, head.weight.shape[1], requires_grad=True) for head in heads)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logits = tuple(head.logits(hidden) for head, hidden in zip(heads, outputs, strict=True))
    values = []
    for scoring, given in ((FromHiddenStates, outputs), (FromLogits, logits)):
        value = scoring(vocab_size=9, temperature=0.7).divergence(models, given, mask, beta)
        values.append((value, *torch.autograd.grad(value.square().sum(), (outputs[0], heads[0].weight))))
    for ours, full in zip(*values, strict=True):
        torch.testing.assert_close(ours, full)


def test_autocast_around_the_statistics_changes_nothing(tmp_path):
    """A loss is inside it, the scoring outside; the hidden states say in what the head runs (TRL's may be float32)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, seed=1))
    width = cf.head_of(model).weight.shape[0]
    hidden = torch.randn(2, 3, cf.head_of(model).weight.shape[1])
    outputs, tokens = (hidden, hidden.flip(0)), torch.ones(2, 3, dtype=torch.int64)
    mask, constraint = tokens.bool(), cf.Constraint(budget=0.1, cost="jsd", beta=0.3)
    scoring, found = FromHiddenStates(vocab_size=width, temperature=1.0), []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            stats = scoring.token_stats((model, model), outputs, tokens, mask)
            divergence = scoring.divergence((model, model), outputs, mask, 0.3)
            settings = {"mask": mask, "constraint": constraint}
            out = scoring.constrained_reward((model, model), outputs, tokens, torch.zeros(2, 3), **settings)
            found.append((*stats, divergence, *out.trace, out.reward))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_sharded_head_is_gathered_for_a_mixture(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = [torch.randn(9, width) for width in (4, 5)]
        sharded = [distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_() for weight in weights]
        leaf = weights[0].clone().requires_grad_()
        outputs, mask = (torch.randn(2, 3, 4), torch.randn(2, 3, 5)), torch.ones(2, 3, dtype=torch.bool)
        monkeypatch.setattr("cmdp_fast.scoring.head_for", lambda model, hidden: cf.Head(model))
        value = FromHiddenStates(vocab_size=9, temperature=1.0).divergence(tuple(sharded), outputs, mask, 0.3)
        expected = cf.linear_divergence(outputs[0], leaf, outputs[1], weights[1], beta=0.3)
        assert torch.equal(value, expected)
        for one in (value, expected):
            one.sum().backward()
        assert torch.equal(sharded[0].grad.full_tensor(), leaf.grad) and sharded[1].grad is None
    finally:
        dist.destroy_process_group()
