"""A gradient written over the logits: whoever still needs them raises, and no gradient is ever wrong."""

import re

import pytest
import torch
from helpers import make_logits, make_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import (
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import cmdp_fast as cf
from cmdp_fast.cpu import native
from cmdp_fast.ops import onlookers
from cmdp_fast.ops.backends import INTERPRETED

needs_native = pytest.mark.skipif(native is None, reason="the native module is not built")
ROWS, VOCAB = 4, 70
WEIGHT = make_logits(VOCAB, VOCAB, scale=0.1, seed=5)


def z_loss(logits):
    return logits.logsumexp(-1).square().sum()


class Ours:
    """The reverse KL, with or without the gradient over the logits."""

    def __init__(self, inplace, backend="cpu"):
        self.settings = {"inplace_backward": inplace, "backend": backend}

    def __call__(self, logits, teacher=None):
        shape = (
            logits.shape
        )  # the tensors go to its device: a checkpoint is computed again in a thread without a default
        teacher = make_logits(*shape, seed=1).to(logits.device) if teacher is None else teacher
        tokens = make_tokens(*shape[:-1], vocab=shape[-1]).to(logits.device)
        return cf.token_stats(logits, teacher, tokens, **self.settings)

    def elsewhere(self):
        """The same, with the gradient in memory of its own."""
        return Ours(False, self.settings["backend"])

    def loss(self, logits):
        stats = self(logits)
        return (stats.reverse_kl + stats.logprob).sum()

    def rewarded(self, logits):
        """The same by way of `cf.constrained_reward`."""
        x, y = logits[None], make_logits(1, *logits.shape, seed=1).to(logits.device)
        tokens = make_tokens(*logits.shape[:-1], vocab=VOCAB)[None].to(logits.device)
        reward = torch.ones(tokens.shape, device=logits.device)
        out = cf.constrained_reward(x, y, tokens, reward, 1.0, **self.settings)
        return (out.stats.reverse_kl + out.stats.logprob).sum()


def gradient(graph, ours):
    """That of a leaf of which a graph makes a scalar."""
    leaf = make_logits(ROWS, VOCAB, scale=1.0).requires_grad_()
    graph(leaf, ours).backward()
    return leaf.grad


def tanh_before(leaf, ours):
    return ours.loss(torch.tanh(leaf))


def rewarded_tanh_before(leaf, ours):
    return ours.rewarded(torch.tanh(leaf))


def z_loss_before(leaf, ours):
    logits = leaf * 1
    return z_loss(logits) + ours.loss(logits)


def z_loss_of_a_view_before(leaf, ours):
    logits = leaf * 1
    return z_loss(logits[1:]) + ours.loss(logits[:, 1:])


def log_softmax_before(leaf, ours):
    return ours.loss(torch.log_softmax(leaf, -1))


def exp_of_a_slice_before(leaf, ours):
    return ours.loss(torch.exp(leaf)[:, :-3])


def head_before(leaf, ours):
    logits = leaf * 1
    return torch.nn.functional.linear(logits, WEIGHT.to(logits.device)).square().mul(logits).sum() + ours.loss(logits)


def ours_twice(leaf, ours):
    logits = leaf * 1
    return ours.loss(logits) + ours.loss(logits)


def divergence_before(leaf, ours):
    logits = leaf * 1
    return cf.divergence(logits, make_logits(ROWS, VOCAB, seed=2).to(logits.device)).sum() + ours.loss(logits)


def teacher_of_another_before(leaf, ours):
    logits = leaf * 1
    return ours.elsewhere()(leaf * 2, teacher=logits).reverse_kl.sum() + ours.loss(logits)


def z_loss_of_the_leaf_before(leaf, ours):
    return z_loss(leaf) + ours.loss(leaf)


NEEDED = [
    tanh_before,
    rewarded_tanh_before,
    z_loss_before,
    z_loss_of_a_view_before,
    log_softmax_before,
    exp_of_a_slice_before,
    head_before,
    ours_twice,
    divergence_before,
    teacher_of_another_before,
    z_loss_of_the_leaf_before,
]


class Watched(TorchDispatchMode):
    """Looks on, so that the operators are dispatched."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def checkpointed(graph, use_reentrant):
    return lambda leaf, ours: checkpoint(lambda x: graph(x, ours), leaf, use_reentrant=use_reentrant)


def under(context, graph):
    """The forward pass of a graph inside a context."""

    def run(leaf, ours):
        with context():
            return graph(leaf, ours)

    return run


@pytest.mark.parametrize("graph", NEEDED, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize(
    "within",
    [
        lambda graph: graph,
        lambda graph: checkpointed(graph, use_reentrant=True),
        lambda graph: under(Watched, graph),
    ],
    ids=["plainly", "a reentrant checkpoint", "a mode of dispatch"],
)
def test_an_operation_that_still_needs_the_logits_raises(graph, within, backend):
    if backend == "torch":
        pytest.skip("it overwrites nothing")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(within(graph), Ours(True, backend))


def as_it_is(t):
    return t


HOOKED = {
    "a checkpoint": lambda graph: checkpointed(graph, use_reentrant=False),
    "nested checkpoints": lambda graph: checkpointed(checkpointed(graph, False), False),
    "a checkpoint inside a reentrant one": lambda graph: checkpointed(checkpointed(graph, False), True),
    "a checkpoint that recomputes everything": lambda graph: under(
        lambda: set_checkpoint_early_stop(False), checkpointed(graph, use_reentrant=False)
    ),
    "offloaded": lambda graph: under(save_on_cpu, graph),
    "hooks that do nothing": lambda graph: under(lambda: saved_tensors_hooks(as_it_is, as_it_is), graph),
}


# Which memory takes the gradient is decided before a kernel is chosen
@pytest.mark.parametrize("graph", list(NEEDED)[:2] if INTERPRETED else NEEDED, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize("within", HOOKED)
def test_through_hooks_nothing_is_overwritten(graph, within, backend):
    """Autograd compares no version of what a hook hands back: the gradient goes elsewhere, and is right."""
    expected = gradient(graph, Ours(False, backend))
    assert torch.equal(gradient(HOOKED[within](graph), Ours(True, backend)), expected)


@needs_native
def test_through_hooks_the_logits_stay():
    logits = make_logits(ROWS, VOCAB).requires_grad_()
    with saved_tensors_hooks(as_it_is, as_it_is):
        loss = Ours(True).loss(logits)
    assert torch.autograd.grad(loss, logits)[0].data_ptr() != logits.data_ptr()
    assert torch.equal(logits, make_logits(ROWS, VOCAB))


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "found out"])
def test_hooks_are_seen(asked, monkeypatch):
    """By the question that PyTorch answers from 2.8 on, and without it."""
    if asked and onlookers._top_hooks is None:
        pytest.skip("this PyTorch does not answer")
    if not asked:
        monkeypatch.setattr(onlookers, "_top_hooks", None)
    assert not onlookers.saves_through_hooks()
    with saved_tensors_hooks(as_it_is, as_it_is), saved_tensors_hooks(as_it_is, as_it_is):
        assert onlookers.saves_through_hooks()
        with torch.no_grad():
            assert not onlookers.saves_through_hooks()
    with disable_saved_tensors_hooks("none here"):
        assert not onlookers.saves_through_hooks()
    seen = []

    def look(x):
        seen.append(onlookers.saves_through_hooks())
        return x.exp().sum()

    for use_reentrant in (False, True):
        checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).backward()
    assert seen == [True, True, False, False]  # the first pass and the second of each
    assert not onlookers.saves_through_hooks()


@needs_native
@pytest.mark.parametrize("graph", NEEDED, ids=lambda graph: graph.__name__)
def test_compiled_autograd_overwrites_nothing(graph):
    """A compiled backward pass compares no versions."""
    from torch._dynamo import compiled_autograd  # here: calls take another way once it has been imported

    def compiled():
        return compiled_autograd._enable(torch.compile(backend="eager"))

    def run(leaf, ours):
        loss = graph(leaf, ours)
        with compiled():
            return torch.autograd.grad(loss, leaf)[0]

    leaf = make_logits(ROWS, VOCAB, scale=1.0).requires_grad_()
    assert torch.equal(run(leaf, Ours(True)), gradient(graph, Ours(False)))
    assert torch.equal(leaf, make_logits(ROWS, VOCAB, scale=1.0))


def z_loss_after(leaf, ours):
    logits = leaf * 1
    return ours.loss(logits) + z_loss(logits)


def head_after(leaf, ours):
    logits = leaf * 1
    return ours.loss(logits) + torch.nn.functional.linear(logits, WEIGHT.to(logits.device)).square().mul(logits).sum()


def ours_after_without(leaf, ours):
    logits = leaf * 1
    return ours.loss(logits) + ours.elsewhere().loss(logits)


def softcap_before(leaf, ours):
    return ours.loss(3.0 * torch.tanh(leaf / 3.0))


def tanh_of_strided_columns(leaf, ours):
    return ours.loss(torch.tanh(leaf)[:, ::2])


def tanh_of_an_expanded_row(leaf, ours):
    return ours.loss(torch.tanh(leaf[:1]).expand(ROWS, VOCAB))


def tanh_with_a_teacher_of_other_rows(leaf, ours):
    logits = torch.tanh(leaf)
    return ours(logits[1:], teacher=logits[:-1].detach()).reverse_kl.sum()


def hook_that_scales(leaf, ours):
    logits = leaf * 1
    logits.register_hook(lambda g: g.mul_(2))
    return ours.loss(logits)


def retained(leaf, ours):
    logits = leaf * 1
    logits.retain_grad()
    return ours.loss(logits) + logits.square().mean(-1).sum().detach() + logits.sum()


UNHARMED = [
    z_loss_after,
    head_after,
    ours_after_without,
    softcap_before,
    tanh_of_strided_columns,
    tanh_of_an_expanded_row,
    tanh_with_a_teacher_of_other_rows,
    hook_that_scales,
    retained,
]


@pytest.mark.parametrize("graph", UNHARMED, ids=lambda graph: graph.__name__)
def test_who_is_done_with_the_logits_or_has_others_is_not_disturbed(graph, backend):
    expected = gradient(graph, Ours(False, backend))
    assert torch.equal(gradient(graph, Ours(True, backend)), expected)


@needs_native
def test_logits_that_were_overwritten_before_the_backward_pass():
    for inplace in (False, True):
        logits = make_logits(ROWS, VOCAB).requires_grad_() * 1
        loss = Ours(inplace).loss(logits)
        logits.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@needs_native
def test_batched_upstream_gradients_are_refused():
    """One memory cannot hold several gradients."""
    logits = make_logits(ROWS, VOCAB).requires_grad_() * 1
    stats = Ours(True)(logits)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for cmdp_fast::token_stats_backward_"):
        torch.autograd.grad(stats.reverse_kl, logits, torch.eye(ROWS), is_grads_batched=True)


@needs_native
def test_gradients_of_a_leaf_add_up_in_its_memory():
    leaf, other = make_logits(ROWS, VOCAB).requires_grad_(), make_logits(ROWS, VOCAB).requires_grad_()
    for x, inplace in ((leaf, True), (other, False)):
        Ours(inplace).loss(x).backward()
        (3 * x.sum()).backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    assert torch.equal(leaf.grad, other.grad)


# --------------------------------------------------------------------------------------------------------------
# Any small graph

MAKES = {
    "copy": lambda leaf: leaf * 1,
    "leaf": lambda leaf: leaf,
    "tanh": torch.tanh,
    "exp": lambda leaf: leaf.exp(),
    "log_softmax": lambda leaf: leaf.log_softmax(-1),
    "softcap": lambda leaf: 2 * torch.tanh(leaf / 2),
    "slice": lambda leaf: leaf.sigmoid()[:, 1:],
    "strided": lambda leaf: leaf.sigmoid()[:, ::2],
    "expanded": lambda leaf: leaf.tanh()[:1].expand(ROWS, VOCAB),
    "unbound": lambda leaf: torch.stack([leaf, 2 * leaf]).unbind()[1],
}
READS = {
    "z-loss": lambda logits, ours: z_loss(logits),
    "square": lambda logits, ours: logits.square().sum(),
    "entropy": lambda logits, ours: (logits.softmax(-1) * logits).sum(),
    "rows": lambda logits, ours: logits[1:].cos().sum(),
    "sum": lambda logits, ours: logits.sum(),
    "ours": lambda logits, ours: ours.loss(logits),
    "ours of rows": lambda logits, ours: ours.loss(logits[1:]),
    "ours, elsewhere": lambda logits, ours: ours.elsewhere().loss(logits),
    "teacher": lambda logits, ours: ours(logits.cos(), teacher=logits).reverse_kl.sum(),
    "divergence": lambda logits, ours: cf.divergence(logits, torch.zeros_like(logits)).sum(),
    "checkpoint": lambda logits, ours: checkpoint(z_loss, logits, use_reentrant=False),
    "reentrant checkpoint": lambda logits, ours: checkpoint(z_loss, logits, use_reentrant=True),
}
WITHIN = {"nothing": as_it_is, "reentrant": lambda graph: checkpointed(graph, True), **HOOKED}


@needs_native
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the first pass of a reentrant checkpoint
@settings(max_examples=150)
@given(
    st.sampled_from(sorted(MAKES)), st.lists(st.sampled_from(sorted(READS)), max_size=4), st.sampled_from(list(WITHIN))
)
def test_a_gradient_is_right_or_an_error(made, reads, within):
    def graph(leaf, ours):
        logits = MAKES[made](leaf)
        return sum((READS[name](logits, ours) for name in reads), start=ours.loss(logits))

    expected = gradient(graph, Ours(False))
    try:
        found = gradient(WITHIN[within](graph), Ours(True))
    except RuntimeError as error:
        assert within not in HOOKED and re.search("modified (by an )?inplace", str(error))
        return
    assert torch.equal(found, expected)
