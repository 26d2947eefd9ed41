"""How the trainer gets from outputs to statistics, and what it says of a model whose head is not known."""

from __future__ import annotations

import pytest
import torch
from tiny_pair import tiny_model
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
