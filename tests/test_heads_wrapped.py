"""Hidden states and head of models that are wrapped: PEFT, DDP, FSDP, torch.compile."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from tiny_models import assert_both_halves_are, assert_same, batch, gradients, tiny
from torch import nn

import cmdp_fast as cf


class Peft(nn.Module):
    """What a PEFT model looks like from outside: calls and attributes are the base model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def test_peft():
    model = tiny()
    assert_both_halves_are(Peft(model), model)


class Alone(nn.Module):
    """Gives no more than the logits, or those and the model's own hidden states."""

    def __init__(self, module: nn.Module, states: bool = False) -> None:
        super().__init__()
        self.module, self.states = module, states

    def forward(self, **inputs):
        output = self.module(**inputs, output_hidden_states=self.states)
        return (output.logits, output.hidden_states) if self.states else output.logits


def test_a_process_alone_leaves_outputs_as_they_are():
    """Of models of one's own under wrappers of one's own, and with hooks that replace them."""

    class Answer(NamedTuple):
        logits: torch.Tensor

    class Own(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.get_output_embeddings = model, model.get_output_embeddings

        def forward(self, **inputs):
            return Answer(self.model(**inputs).logits)

    model = tiny()
    hidden, outputs = cf.last_hidden_state(model, **batch()), []
    wrapped = Alone(Own(model))
    wrapped.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert torch.equal(cf.last_hidden_state(wrapped, **batch()), hidden) and type(outputs[0]) is torch.Tensor
    model.register_forward_hook(lambda module, inputs, output: output.logits)
    assert torch.equal(cf.last_hidden_state(model, **batch()), hidden)


def test_a_wrapper_that_drops_what_it_does_not_know(one_rank):
    """The hidden states leave through the outermost wrapper all the same."""
    model = tiny()
    hidden = cf.last_hidden_state(model, **batch())
    for states in (False, True):
        wrapped = Alone(model, states)
        outputs = []
        wrapped.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output))
        assert torch.equal(cf.last_hidden_state(wrapped, **batch()), hidden)
        assert torch.equal(outputs[0][-1], hidden)
    assert torch.equal(cf.last_hidden_state(Alone(Peft(model)), **batch()), hidden)


def test_data_parallel_gradients_are_reduced(one_rank):
    """The wrapper itself runs, so that it synchronises the gradient of every parameter, the head's included."""
    for unused in (False, True):
        model = tiny()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
        reduced = []

        def count(_, bucket, reduced=reduced):
            reduced.append(len(bucket.gradients()))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        head = cf.head_of(wrapped)
        model(**batch()).logits.square().sum().backward()
        expected = gradients(model)
        for _ in range(2):
            reduced.clear()
            head.logits(cf.last_hidden_state(wrapped, **batch())).square().sum().backward()
            assert sum(reduced) == len(expected)
            for name, grad in gradients(wrapped.module).items():
                assert_same(grad, expected[name])


def test_fully_sharded(one_rank):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    plain = tiny()
    model = copy.deepcopy(plain)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    hidden = cf.last_hidden_state(model, **batch())
    logits = cf.head_of(model).logits(hidden)
    expected = plain(**batch()).logits
    assert_same(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, sharded), (_, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert sharded.grad is not None, name
        assert_same(sharded.grad.full_tensor(), whole.grad)


class Graphs:
    """A backend of torch.compile that runs what it is given and counts the graphs."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


def compiled(how: str, model: nn.Module, backend: Graphs) -> nn.Module:
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    else:
        model.model.compile(backend=backend)
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "base model"])
def test_compiled(how):
    """The model is not compiled again for the hooks, nor its graph used with or without them when it should not be."""
    plain = tiny()
    graphs = Graphs()
    model = compiled(how, copy.deepcopy(plain), graphs)
    head = cf.head_of(model)
    with torch.no_grad():
        expected = plain(**batch()).logits
        cf.last_hidden_state(model, **batch())
        assert (graphs.count > 0) == (how == "base model")
        assert_same(model(**batch()).logits, expected)
        before = graphs.count
        for _ in range(3):
            assert_same(head.logits(cf.last_hidden_state(model, **batch())), expected)
            assert_same(model(**batch()).logits, expected)
        assert graphs.count == before > 0


def test_called_from_compiled_code():
    model = tiny()
    head = cf.head_of(model)
    graphs, inputs = Graphs(), batch()
    step = torch.compile(lambda: head.logits(cf.last_hidden_state(model, **inputs)).sum(), backend=graphs)
    with torch.no_grad():
        expected = model(**batch()).logits.sum()
        for _ in range(3):
            assert_same(step(), expected)
    assert graphs.count == 1, "the head's part alone"
