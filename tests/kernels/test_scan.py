"""The scan of sequences by a kernel: long and short, padded and packed, with and without masks."""

import itertools

import pytest
import torch
from helpers import assert_no_worse, make_logits, make_tokens

from cmdp_fast import reference
from cmdp_fast.layout import BudgetRule, Rewarding, RewardRule
from cmdp_fast.ops import backends
from cmdp_fast.ops.backends import INTERPRETED
from cmdp_fast.ops.budget import empty_outcome

kernels = backends.get("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(kernels is None, reason="the triton backend does not work here"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTHS = {
    "1 x 8192": [8192],
    "8 x 1024": [1024] * 8,
    "64 x 128": [128] * 64,
    "odd": [0, 1, 2047, 2049, 0, 3, 4097, 0],
    "empty": [0, 0],
}


def scanned(costs, limits, mask, offsets, rule, reward_rule, *, width=0, per_token=False):
    """The trace and the modified reward of costs, the task's reward being 1, from the scan itself."""
    from cmdp_fast.kernels import launch, scan, sequences

    if offsets is None:
        trace, reward = empty_outcome(costs.view(-1, width), costs.dtype, costs.numel() // width)
    else:
        trace, reward = empty_outcome(costs, costs.dtype, offsets.shape[0] - 1)
    trace, reward = trace._replace(**{k: t.flatten() for k, t in trace._asdict().items()}), reward.flatten()
    scan.scan_sequences(
        sequences.Sequences(offsets, width, costs.numel()),
        scan.Allowance(scan.Budgets(limits, limits.stride(0)), 0.0, per_token, True),
        sequences.Tokens(costs, None, launch.flags(mask), None),
        rule,
        trace,
        Rewarding(reward_rule, torch.ones_like(costs), reward),
    )
    return trace, reward


def batch(lengths, masked):
    total = sum(lengths)
    costs = make_logits(total, scale=1.0).abs().to(DEVICE)
    mask = make_tokens(total, vocab=4).bool().to(DEVICE) if masked else None
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    return costs, mask, offsets


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_long_and_short_sequences_against_the_reference(lengths, masked):
    costs, mask, offsets = batch(lengths, masked)
    limits = torch.tensor([0.6 * n for n in lengths], device=DEVICE).double()  # the kernel rounds to float32
    for rule, kind in (
        (BudgetRule(1.0, False, False), "cmdp"),
        (BudgetRule(0.999, False, False), "saute"),
        (BudgetRule(1.0, True, True), "hinge"),
        (BudgetRule(1.0, False, False), "barrier"),
    ):
        if rule.mean or rule.gamma != 1.0:
            limits = torch.full_like(limits, 0.75 if rule.mean else 300.0)
        reward_rule = RewardRule(kind, kind == "cmdp", 1.0, 1.0, 0.5, 10.0)
        trace, reward = scanned(costs, limits, mask, offsets, rule, reward_rule)
        settings = {"gamma": rule.gamma, "reduction": "mean" if rule.mean else "sum"}
        settings |= {"edge": "saute" if rule.inclusive else "strict", "mask": mask, "cu_seqlens": offsets}
        rewards = {"kind": kind, "coefficient": 0.5, "mask": mask, "cu_seqlens": offsets}
        exact, eager = (reference.budget_trace(c, limits, **settings) for c in (costs.double(), costs))
        for name in ("cumulative", "remaining", "excess"):
            size = float(exact.cumulative.abs().max()) if costs.numel() else 1.0
            ours, theirs, truth = (getattr(t, name) for t in (trace, eager, exact))
            assert_no_worse(ours, theirs, truth, f"{kind} {name}", size=1.0 if name == "excess" else size)
        assert torch.equal(trace.violated, exact.violated) and torch.equal(trace.first_violation, exact.first_violation)
        assert rule.mean or trace.excess.ge(0).all()  # no cost is negative
        theirs, truth = (
            reference.modified_reward(torch.ones_like(c), c, t, **rewards)
            for c, t in ((costs, eager), (costs.double(), eager))
        )
        assert_no_worse(reward, theirs, truth, kind, size=10.0 * float(costs.max()) if costs.numel() else 1.0)


@pytest.mark.parametrize("lengths", [[4100] * 2, [512] * 5, [17] * 7])
@pytest.mark.parametrize("kind", ["cmdp", "barrier"])
def test_a_sequence_is_bitwise_the_same_padded_and_packed(lengths, kind):
    """At another place of memory, too."""
    costs, mask, _ = batch(lengths, masked=True)
    width, count = lengths[0], len(lengths)
    limits = torch.full((count,), 0.4, dtype=torch.float64, device=DEVICE)
    rules = BudgetRule(0.999, kind == "cmdp", False), RewardRule(kind, True, 1.0, 1.0, 0.5, 10.0)
    padded, reward = scanned(costs, limits, mask, None, *rules, width=width, per_token=True)
    shifted = torch.arange(count + 1, device=DEVICE) * width + 3
    front = torch.zeros(3, device=DEVICE)
    packed, again = scanned(
        torch.cat([front, costs]), limits, torch.cat([front.bool(), mask]), shifted, *rules, per_token=True
    )
    assert torch.equal(reward, again[3:])
    for name in ("cumulative", "remaining", "violated", "excess"):
        assert torch.equal(getattr(padded, name), getattr(packed, name)[3:]), name
    assert torch.equal(padded.first_violation, packed.first_violation)


def test_tokens_that_cost_nothing_leave_the_account_as_it_was():
    costs, _, offsets = batch([5000], masked=False)
    costs[1::2] = 0
    limits = torch.tensor([100.0], dtype=torch.float64, device=DEVICE)
    trace, _ = scanned(
        costs.double(), limits, None, offsets, BudgetRule(1.0, False, False), RewardRule("hinge", True, 1.0, 1.0, 0, 0)
    )
    assert trace.excess[1::2].eq(0).all() and trace.excess.ge(0).all()


@pytest.mark.parametrize("offsets", [[9, 3], [2**32 + 5, 2**40], [-7, 2**40], [2**40, 3]], ids=str)
def test_offsets_that_nobody_has_checked_lead_nowhere_else(offsets):
    """A sequence begins and ends within the tokens, and has no length below 0."""
    costs = torch.ones(12, device=DEVICE)
    guarded = torch.full((36,), 7.0, device=DEVICE)
    guarded[12:24] = costs
    limits = torch.full((1,), 2.5, dtype=torch.float64, device=DEVICE)
    rules = BudgetRule(1.0, False, False), RewardRule("cmdp", True, 1.0, 1.0, 0.5, 10.0)
    trace, _ = scanned(guarded[12:24], limits, None, torch.tensor(offsets, device=DEVICE), *rules)
    begin, stop = (min(max(o, 0), 12) for o in offsets)
    held = max(stop - begin, 0)
    assert trace.first_violation.tolist() == [min(2, held)]
    assert (trace.cumulative != 0).sum() == held
