"""What the CUDA kernels promise beyond the shared suite: results that depend on nothing but the row, in whatever order
blocks and threads come; one launch; counters that are left as they were found; and which calls they serve."""

import math

import hosted
import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, exact_and_eager, make_logits, make_tokens, weighted_sum

import cmdp_fast as cf
from cmdp_fast.layout import Account, BudgetRule, Pair, Rewarding, RewardRule, Settlement
from cmdp_fast.ops import backends
from cmdp_fast.reference import BudgetTrace

cuda = backends.get("cuda")
pytestmark = pytest.mark.cuda
needs_cuda = pytest.mark.skipif(
    cf.available_backends()["cuda"] is not None, reason="the cuda backend does not work here"
)
DEVICE = "cpu" if hosted.HOSTED else "cuda"
OPS = torch.ops.cmdp_fast
ORDERS = (0, 1, 2, 3, 4, 5)  # on a GPU: as many runs
# Around one warp, a step, each row of the table of settings, a segment, a span of the backward pass; Qwen2.5.
WIDTHS = (31, 33, 255, 513, 1023, 1024, 2049, 4097, 16383, 16384, 16385, 32769, 65544, 151936)


def batch(rows, width, dtype=torch.bfloat16, teacher=None):
    x, y = make_logits(rows, width, dtype=dtype), make_logits(rows, width, dtype=teacher or dtype, seed=1)
    return x.to(DEVICE), y.to(DEVICE), make_tokens(rows, vocab=width).to(DEVICE)


def everything(x, y, tokens, **settings):
    """All statistics and the gradient of all of them."""
    x = x.detach().requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend="cuda", **settings)
    loss = sum((1 + i) * getattr(stats, name).sum() for i, name in enumerate(DIFFERENTIABLE))
    return [*stats, *torch.autograd.grad(loss, x)]


def saved_scalars(x, y, tokens):
    """In float64, where an order of additions shows that float32 statistics round away."""
    return OPS.token_stats(x, y, tokens, None, 1.0, x.shape[-1], False, "cuda")[6]


def same(a, b):
    return all(torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)) for p, q in zip(a, b, strict=True))


@needs_cuda
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_widths_around_every_tile(width, dtypes):
    x, y, tokens = (t.cpu() for t in batch(1 if width > 20000 else 2, width, *dtypes))
    weights = {name: torch.full(tokens.shape, 0.5 + i) for i, name in enumerate(DIFFERENTIABLE)}
    exact, eager = exact_and_eager(x, y, tokens, weights)
    logits = x.to(DEVICE).requires_grad_()
    stats = cf.token_stats(logits, y.to(DEVICE), tokens.to(DEVICE), backend="cuda")
    gradient = torch.autograd.grad(weighted_sum(stats, {k: w.to(DEVICE) for k, w in weights.items()}), logits)[0].cpu()
    for name in stats._fields:
        assert_no_worse(getattr(stats, name).cpu(), getattr(eager[0], name), getattr(exact[0], name), name)
    size = float(3 * exact[0].reverse_kl.detach().abs().max())
    assert_no_worse(gradient, eager[1].to(x.dtype), exact[1], "gradient", size=size)


@needs_cuda
@pytest.mark.parametrize("width", [999, 17001, 70003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_in_every_order_and_batch(width, dtype):
    """Odd widths: rows of one batch lie at different alignments."""
    x, y, tokens = batch(4, width, dtype)
    x[3, width // 2] = -torch.inf  # folded a second time, carefully
    hosted.seed(0)
    whole, saved = everything(x, y, tokens), saved_scalars(x, y, tokens)
    for order in ORDERS[1:]:
        hosted.seed(order)
        assert same(whole, everything(x, y, tokens)), order
        assert same([saved], [saved_scalars(x, y, tokens)]), order
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
            alone = everything(x[rows].clone(), y[rows].clone(), tokens[rows])
            assert same([a[rows] for a in whole], alone), (order, rows)


@needs_cuda
@pytest.mark.parametrize("width", [1000, 17000, 40000])
def test_alignment_changes_no_bit(width):
    """128-bit loads and stores where rows lie for them, and a column at a time where they do not."""
    x, y, tokens = batch(3, width)
    outcomes = []
    for shift in (0, 1, 3, 4):
        rows = [torch.nn.functional.pad(t, (shift, 8 - shift))[:, shift : shift + width] for t in (x, y)]
        outcomes.append(everything(*rows, tokens))
    assert all(same(outcomes[0], other) for other in outcomes[1:])


@needs_cuda
@pytest.mark.parametrize("width", [700, 17000, 50000])
def test_gradients_in_place_in_every_order(width):
    """Blocks of one row overwrite what they have read, and nothing that another has yet to read."""
    x, y, tokens = batch(3, width)
    mask = torch.tensor([True, False, True], device=DEVICE)
    x[2, 5] = -torch.inf
    expected = everything(x, y, tokens, mask=mask, vocab_size=width - 3)[-1]
    for order in ORDERS:
        hosted.seed(order)
        memory = x.clone()
        gradient = everything(memory, y, tokens, mask=mask, vocab_size=width - 3, inplace_backward=True)[-1]
        assert gradient.data_ptr() == memory.data_ptr() and torch.equal(gradient, expected), order


def completions(width, dtype=torch.bfloat16, packed=False):
    """Three sequences of up to 300 tokens: longer than a block has threads."""
    lengths = (300, 1, 65)
    x, y, tokens = batch(366, width, dtype)
    reward = make_logits(366, scale=1.0, seed=4).to(DEVICE)
    mask = make_tokens(366, vocab=4, seed=2).to(DEVICE) > 0
    if packed:
        offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        return (x, y, tokens, reward), {"mask": mask, "cu_seqlens": offsets}
    shape = (2, 183)
    return (x.view(*shape, -1), y.view(*shape, -1), tokens.view(shape), reward.view(shape)), {"mask": mask.view(shape)}


def flattened(out):
    return [*out.stats, *out.trace, out.reward]


@needs_cuda
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind, cost", [("cmdp", "reverse_kl"), ("barrier", "k1"), ("worst_case", "nll")])
def test_the_whole_method_in_every_order(kind, cost, packed):
    """Bitwise its parts in turn, whichever block is the last of a row and of a sequence."""
    inputs, layout = completions(40, packed=packed)
    settings = {"kind": kind, "coefficient": None if kind == "worst_case" else 0.3}
    budget = 9.0 if kind == "worst_case" else 60.0
    stats = cf.token_stats(*inputs[:3], mask=layout["mask"], backend="cuda")
    paid = cf.token_cost(stats, cost)
    reduction = "mean" if kind == "worst_case" else "sum"
    trace = cf.budget_trace(paid, budget, reduction=reduction, backend="cuda", **layout)
    reward = cf.modified_reward(inputs[3], paid, trace, backend="cuda", **settings, **layout)
    assert trace.violated.any() and not trace.violated[layout["mask"]].all()
    for order in ORDERS:
        hosted.seed(order)
        got = cf.constrained_reward(*inputs, budget, cost=cost, backend="cuda", **settings, **layout)
        assert same([*stats, *trace, reward], flattened(got)), order
        counters_are_clear()


@needs_cuda
def test_rows_of_several_segments_in_every_order():
    """Two counters at once: of a row's segments, and of a sequence's rows."""
    x, y, tokens = batch(6, 70000)
    x[4, 69999] = -torch.inf
    inputs = x.view(2, 3, -1), y.view(2, 3, -1), tokens.view(2, 3), torch.ones(2, 3, device=DEVICE)
    outcomes = []
    for order in ORDERS:
        hosted.seed(order)
        outcomes.append(flattened(cf.constrained_reward(*inputs, 5.0, per_token=True, backend="cuda")))
        counters_are_clear()
    assert all(same(outcomes[0], other) for other in outcomes[1:])


def counters_are_clear():
    assert all(not counters.any() for counters in cuda._counters.values())


@needs_cuda
def test_offsets_nobody_has_checked_lead_nowhere_and_leave_no_counter_behind():
    """On the CPU they are an error; on a GPU nobody looks, and the kernels stay within the tensors."""
    x, y, tokens = batch(4, 50, torch.float32)
    room = [torch.full((8,), 7.0, device=DEVICE) for _ in range(5)]
    lines = [t[2:6] for t in room]
    violated, first = torch.zeros(4, dtype=torch.bool, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    trace = BudgetTrace(lines[0], lines[1], violated, first, lines[2])
    rule, paid = BudgetRule(1.0, False, False), RewardRule("cmdp", True, 1.0, 1.0, 0.0, 0.0)
    pair = Pair(x, y, tokens, None, 1.0, 50)
    rewarding = Rewarding(paid, lines[3], lines[4])
    for order in ORDERS:
        hosted.seed(order)
        for offsets in ([-3, 2, 900], [3, 1, 2], [0, 4, 4], [0, 0, 0], [9, -9, 9]):
            cu = torch.tensor(offsets, device=DEVICE)
            cuda.constrained_pass(pair, Settlement("reverse_kl", cu, 1.5, False, rule, trace, rewarding))
            counters_are_clear()
            limits = torch.full((2,), 1.5, dtype=torch.float64, device=DEVICE)
            cuda.trace_budgets(Account(lines[3], None, cu), limits, rule, trace, rewarding)
        assert all(t[:2].eq(7.0).all() and t[6:].eq(7.0).all() for t in room)


@needs_cuda
def test_a_token_outside_the_vocabulary_reads_nothing():
    """On the CPU it is an error; on a GPU nobody looks, and its log-probabilities are NaN."""
    x, y, tokens = batch(3, 40)
    tokens[1], tokens[2] = 40, -1
    statistics, _ = cuda.token_stats(Pair(x, y, tokens, None, 1.0, 40))
    for name, value in zip(cf.TokenStats._fields, statistics, strict=True):
        assert value.isnan().tolist() == [False, *[name.endswith("logprob")] * 2], name


@needs_cuda
@pytest.mark.skipif(not hosted.HOSTED, reason="launches are counted on the host")
def test_every_operation_is_one_launch():
    inputs, layout = completions(40, torch.float32)
    offsets = torch.tensor([0, 183, 366])
    stats = cf.token_stats(*inputs[:3], mask=layout["mask"], backend="cuda")
    trace = cf.budget_trace(stats.reverse_kl, 1.0, backend="cuda")
    for call in (
        lambda: cf.token_stats(*inputs[:3], backend="cuda"),
        lambda: cf.constrained_reward(*inputs, 1.0, per_token=True, gamma=0.5, backend="cuda", **layout),
        lambda: cf.constrained_reward(
            *(t.flatten(0, 1) for t in inputs), torch.tensor([1.0, 2.0]), cu_seqlens=offsets, backend="cuda"
        ),
        lambda: cf.budget_trace(stats.reverse_kl, 1.0, backend="cuda"),
        lambda: cf.modified_reward(inputs[3], stats.reverse_kl, trace, backend="cuda"),
    ):
        before = hosted.launches()
        call()
        assert hosted.launches() == before + 1


@needs_cuda
def test_float64_is_left_to_pytorch():
    x = make_logits(2, 9, dtype=torch.float64).to(DEVICE)
    for pair in ((x, x), (x, x.float()), (x.float(), x)):
        with pytest.raises(ValueError, match=r"backend='cuda' takes .* got float64; use backend='torch'"):
            cf.token_stats(*pair, torch.zeros(2, dtype=torch.int64, device=DEVICE), backend="cuda")


def samples():
    """The operators as torch sees them."""
    x, y, tokens = batch(6, 37, torch.float32)
    x, y, tokens = x.view(2, 3, 37), y.view(2, 3, 37), tokens.view(2, 3)
    mask, reward = torch.tensor([[True] * 3, [True, False, True]], device=DEVICE), torch.ones(2, 3, device=DEVICE)
    *_, saved = OPS.token_stats(x, y, tokens, mask, 1.0, 37, False, "cuda")
    yield "token_stats", (x.clone().requires_grad_(), y, tokens, mask, 1.0, 37, False, "cuda")
    yield "token_stats_backward", (x, y, tokens, mask, 1.0, 37, saved, reward, None, reward, None, "cuda")
    yield "token_stats_backward_", (x.clone(), y, tokens, mask, 1.0, 37, saved, None, reward, None, reward, "cuda")
    rules = (1.0, False, False), ("cmdp", True, 1.0, 1.0, 0.0, 10.0)
    pair = (x.clone().requires_grad_(), y, tokens, mask, 1.0, 37)
    spending = ("reverse_kl", False, *rules[0], *rules[1])
    yield "constrained_pass", (*pair, reward, None, None, 0.5, *spending, False, "cuda")


@needs_cuda
@pytest.mark.parametrize("name", ["token_stats", "token_stats_backward", "token_stats_backward_", "constrained_pass"])
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, dict(samples())[name])


# --------------------------------------------------------------------------------------------------------------
# Which backend a call gets


@needs_cuda
def test_only_some_operations_have_a_cuda_kernel():
    x, y, tokens = batch(2, 9, torch.float32)
    reward = torch.ones(1, 2, device=DEVICE)
    hidden, weight = torch.ones(2, 4, device=DEVICE), torch.ones(9, 4, device=DEVICE)
    for call in (
        lambda: cf.divergence(x, y, "jsd", backend="cuda"),
        lambda: cf.constrained_reward(x[None], y[None], tokens[None], reward, 1.0, cost="jsd", backend="cuda"),
        lambda: cf.TokenState.empty(2, device=DEVICE).update(x, y, tokens, backend="cuda"),
        lambda: cf.linear_token_stats(hidden, weight, hidden, weight, tokens, backend="cuda"),
        lambda: cf.linear_topk_stats(hidden, weight, tokens[:, None], hidden[:, :1] - 2, tokens, backend="cuda"),
        lambda: cf.token_stats(x, y, tokens, first_column=1, backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"backend='cuda' has no kernel for .*; use backend='triton'"):
            call()
    stats = cf.token_stats(x, y, tokens, backend="cuda")
    assert torch.equal(cf.divergence(x, y, "forward_kl", backend="cuda"), stats.forward_kl)
    assert cf.constrained_reward(x[None], y[None], tokens[None], reward, 1.0, cost="k3", backend="cuda").reward.any()


@needs_cuda
def test_settings_do_not_depend_on_the_default_device():
    """Scratch memory lies where the logits do."""
    x, y, tokens = batch(2, 40)
    with torch.device("meta"):
        assert math.isfinite(cf.token_stats(x, y, tokens, backend="cuda").entropy.sum().item())
