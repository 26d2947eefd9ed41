"""Models that have no two halves, or not those that they seem to have: an error says why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import BASE, assert_both_halves_are, batch, tiny  # skips this module where transformers is absent
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import cmdp_fast as cf


class Custom(LlamaForCausalLM):
    """A Llama that does something to its logits that no configuration mentions."""

    def __init__(self, change) -> None:
        torch.manual_seed(0)
        super().__init__(LlamaConfig(**BASE))
        self.change = change

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


UNKNOWN = {
    "scale": lambda x: x * 1.001,
    "softcap": lambda x: 50 * torch.tanh(x / 50),
    "bias": lambda x: x + 0.01,
    "one column": lambda x: x.index_fill(-1, torch.tensor([7]), torch.finfo(x.dtype).min),
    "temperature": lambda x: x / 0.7,
    "nan": lambda x: x * float("nan"),
    "clamp": lambda x: x.clamp(-100, 100),
    "permuted": lambda x: x.flip(-1),
    "log-softmax": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_postprocessing_is_refused(change):
    with pytest.raises(ValueError, match=r"Custom does something to its logits that is not known here.*softcap=None"):
        cf.head_of(Custom(change))


def test_scale_and_softcap_together():
    """The scale comes first, as in Muse; a model that does it the other way round is refused."""
    model = Custom(lambda x: 20 * torch.tanh(x * 0.5 / 20))
    model.config.output_multiplier, model.config.final_logit_softcapping = 0.5, 20.0
    assert (cf.head_of(model).softcap, cf.head_of(model).scale) == (20.0, 0.5)
    assert_both_halves_are(model)
    other = Custom(lambda x: 0.5 * 20 * torch.tanh(x / 20))
    other.config = model.config
    with pytest.raises(ValueError, match="not known here"):
        cf.head_of(other)


def test_columns_that_are_cut_are_refused():
    with pytest.raises(ValueError, match=r"logits of shape \[1, 2, 90\] from the \[1, 2, 101\] of its head"):
        cf.head_of(Custom(lambda x: x[..., :90]))


def test_a_forward_that_was_replaced_is_refused():
    model = tiny()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 1.01
    with pytest.raises(ValueError, match="does not return h W\\^T \\+ b: something changes its forward"):
        cf.head_of(model)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


class Quantized(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(16, 101, bias=False)
        self.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)


class Packed(torch.Tensor):
    """A tensor that claims a dtype in which it is not stored."""


class Multi(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_heads_that_are_not_plain_are_refused():
    cases = [
        (Lora, TypeError, r"LlamaForCausalLM, a Lora, carries an adapter.*target modules"),
        (Quantized, TypeError, r"is quantized: its weight is a Parameter of torch.int8; expected a plain tensor"),
        (lambda _: Multi(16, 101), TypeError, r"a Multi, is not a plain torch.nn.Linear"),
        (lambda _: nn.Sequential(nn.Linear(16, 101)), TypeError, r"a Sequential, is not a plain torch.nn.Linear"),
        (lambda head: head.to("meta"), ValueError, r"the weight of .* is offloaded; expected all of it, \[101, 16\]"),
    ]
    for replace, error, message in cases:
        model = tiny()
        model.lm_head = replace(model.lm_head)
        with pytest.raises(error, match=message):
            cf.head_of(model)
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    with pytest.raises(TypeError, match="is quantized: its weight is a "):
        cf.head_of(model)
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"is sharded, its shape is \[0\]; expected all of it, \[101, 16\]"):
        cf.head_of(model)


def test_models_that_are_no_causal_language_models_are_refused():
    for function in (cf.head_of, cf.last_hidden_state):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("gpt2")
        with pytest.raises(TypeError, match=r"LlamaModel has no output embedding.*get_output_embeddings"):
            function(tiny().model)
        with pytest.raises(TypeError, match=r"Linear has no output embedding"):
            function(nn.Linear(2, 2))


def test_a_head_that_is_called_twice_or_never_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="called its output embedding 2 times; expected once"):
        cf.last_hidden_state(CalledAgain(model), **batch())
    model.get_output_embeddings = lambda: nn.Linear(16, 101)
    for function in (cf.head_of, lambda m: cf.last_hidden_state(m, **batch())):
        with pytest.raises(ValueError, match="LlamaForCausalLM called its output embedding 0 times"):
            function(model)


class CalledAgain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        self.module(**inputs)
        return self.module(**inputs)


def test_an_output_that_a_hook_replaces_is_refused_among_processes(one_rank):
    """FSDP and DDP wait for outputs; in a process alone nobody does (test_heads_wrapped.py)."""
    model = tiny()
    model.register_forward_hook(lambda module, inputs, output: output.logits)
    with pytest.raises(ValueError, match="a forward hook of LlamaForCausalLM put a Tensor in the place of its output"):
        cf.last_hidden_state(model, **batch())


def test_labels_are_refused():
    with pytest.raises(TypeError, match="labels= makes the model compute a loss"):
        cf.last_hidden_state(tiny(), **batch(), labels=batch()["input_ids"])


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(101, 16), nn.Linear(16, 101)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids):
        return (self.head(self.embed(input_ids)),)


def test_a_model_of_another_library():
    """Hidden states need no more than `get_output_embeddings`; the head needs `.logits` as well."""
    model = Tuples()
    ids = batch()["input_ids"]
    assert torch.equal(cf.last_hidden_state(model, ids), model.embed(ids))
    with pytest.raises(TypeError, match=r"Tuples returned a tuple; expected an output with .logits"):
        cf.head_of(model)


def test_transformers_is_not_imported():
    code = "import sys, cmdp_fast; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
