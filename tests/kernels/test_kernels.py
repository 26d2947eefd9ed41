"""Promises of the GPU kernels beyond the shared suite: a row's result depends on nothing but the row, how many launches
a batch takes, and fake tensors on a GPU."""

import math
import sys

import pytest
import torch
from helpers import DIFFERENTIABLE, assert_no_worse, exact_and_eager, make_logits, make_tokens, weighted_sum
from torch._subclasses.fake_tensor import FakeTensorMode

import cmdp_fast as cf
from cmdp_fast import states
from cmdp_fast.arrays import count_rows
from cmdp_fast.layout import Account, BudgetRule, Mixture, Pair, Rewarding, RewardRule, Upstream
from cmdp_fast.ops import backends
from cmdp_fast.ops.arguments import flatten
from cmdp_fast.ops.backends import INTERPRETED
from cmdp_fast.reference import BudgetTrace

kernels = backends.get("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(kernels is None, reason="the triton backend does not work here"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# One more than a step of one lane, than each tile of the table of launch settings, and than a segment; Qwen2.5.
WIDTHS = (17, 513, 1023, 1024, 2049, 4097, 16383, 16385, 20481, 151936)


def everything(x, y, tokens, **settings):
    """All statistics and the gradient of all of them, as one list."""
    x = x.detach().requires_grad_()
    stats = cf.token_stats(x, y, tokens, backend="triton", **settings)
    jsd = cf.divergence(x, y, backend="triton")
    loss = sum(getattr(stats, name).sum() for name in DIFFERENTIABLE)
    return [*stats, jsd, *torch.autograd.grad(loss, x, retain_graph=True), *torch.autograd.grad(jsd.sum(), x)]


def batch(rows, width, dtype=torch.bfloat16):
    x, y = make_logits(rows, width, dtype=dtype), make_logits(rows, width, dtype=dtype, seed=1)
    return x.to(DEVICE), y.to(DEVICE), make_tokens(rows, vocab=width).to(DEVICE)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_around_every_tile(width):
    x, y, tokens = (t.cpu() for t in batch(1 if width > 20000 else 2, width))
    weights = {name: torch.full(tokens.shape, 0.5 + i) for i, name in enumerate(DIFFERENTIABLE)}
    exact, eager = exact_and_eager(x, y, tokens, weights)
    logits = x.to(DEVICE).requires_grad_()
    stats = cf.token_stats(logits, y.to(DEVICE), tokens.to(DEVICE), backend="triton")
    gradient = torch.autograd.grad(weighted_sum(stats, {k: w.to(DEVICE) for k, w in weights.items()}), logits)[0].cpu()
    for name in stats._fields:
        assert_no_worse(getattr(stats, name).cpu(), getattr(eager[0], name), getattr(exact[0], name), name)
    size = float(3 * exact[0].reverse_kl.detach().abs().max())
    assert_no_worse(gradient, eager[1].to(x.dtype), exact[1], "gradient", size=size)


@pytest.mark.parametrize("width", [999, 17001])
def test_a_row_is_bitwise_the_same_in_every_batch_and_run(width):
    """Odd widths: rows of one batch lie at different alignments."""
    x, y, tokens = batch(4, width)
    x[3, width // 2] = -torch.inf  # folded a second time, carefully
    whole = everything(x, y, tokens)
    for a, b in zip(whole, everything(x, y, tokens), strict=True):
        assert torch.equal(a, b)
    for rows, place in ((slice(0, 1), torch.clone), (slice(1, 2), torch.clone), (slice(2, 4), lambda t: t)):
        parts = everything(place(x[rows]), place(y[rows]), tokens[rows])
        for a, b in zip(whole, parts, strict=True):
            assert torch.equal(a[rows], b), rows


def test_a_token_outside_the_vocabulary_reads_nothing():
    """On the CPU it is an error; on a GPU it is not looked for, and its log-probabilities are NaN."""
    x, y, tokens = batch(3, 40)
    tokens[1], tokens[2] = 40, -1
    statistics, _ = kernels.token_stats(Pair(x, y, tokens, None, 1.0, 40))
    for name, value in zip(cf.TokenStats._fields, statistics, strict=True):
        assert value.isnan().tolist() == [False, *[name.endswith("logprob")] * 2], name


def test_settings_do_not_depend_on_the_default_device():
    """A setting computed on a GPU by default would be read back from it: no graph could be captured."""
    with torch.device("meta"):
        assert kernels.launch.scale_of(2.0) == pytest.approx(0.5 / math.log(2), rel=1e-7)


def test_unchecked_offsets_lead_nowhere():
    """On the CPU wrong ones are an error; on a GPU they are not looked for, and the kernels stay within the tensors."""
    cost, reward = torch.ones(4, device=DEVICE), torch.zeros(8, device=DEVICE)
    offsets, limits = (
        torch.tensor([-3, 2, 900], device=DEVICE),
        torch.full((2,), 1.5, dtype=torch.float64, device=DEVICE),
    )
    room = [torch.full((8,), 7.0, device=DEVICE) for _ in range(3)]
    lines = [t[2:6] for t in room]
    violated, first = torch.zeros(4, dtype=torch.bool, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    trace = BudgetTrace(lines[0], lines[1], violated, first, lines[2])
    rewarding = Rewarding(RewardRule("cmdp", True, 1.0, 1.0, 0.0, 0.0), cost, reward[2:6])
    kernels.trace_budgets(Account(cost, None, offsets), limits, BudgetRule(1.0, False, False), trace, rewarding)
    assert lines[0].tolist() == [1.0, 2.0, 1.0, 2.0] and first.tolist() == [1, 1]
    assert all(t[:2].eq(7.0).all() and t[6:].eq(7.0).all() for t in room)
    assert reward[:2].eq(0.0).all() and reward[6:].eq(0.0).all()


class Launches:
    """Counts the kernels that are launched."""

    def __init__(self, monkeypatch):
        self.names = []
        for path, module in list(sys.modules.items()):
            if path.startswith(f"{kernels.__name__}."):
                for name, kernel in list(vars(module).items()):
                    if name.endswith("_kernel"):
                        monkeypatch.setattr(module, name, self.counted(name, kernel))

    def counted(self, name, kernel):
        outer = self

        class Counted:
            def __getitem__(self, grid):
                outer.names.append(name)
                return kernel[grid]

        return Counted()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cost", ["reverse_kl", "k1"])
def test_constrained_reward_is_three_launches(packed, cost, monkeypatch):
    x, y, tokens = batch(6, 300)
    reward, launches = torch.ones(6, device=DEVICE), Launches(monkeypatch)
    layout = {"cu_seqlens": torch.tensor([0, 2, 6], device=DEVICE)} if packed else {}
    if not packed:
        x, y, tokens, reward = x.view(2, 3, 300), y.view(2, 3, 300), tokens.view(2, 3), reward.view(2, 3)
    for per_token in (False, True):
        launches.names.clear()
        cf.constrained_reward(
            x, y, tokens, reward, 0.5, cost=cost, per_token=per_token, gamma=0.5, backend="triton", **layout
        )
        assert launches.names == ["fold_kernel", "finish_kernel", "scan_kernel"]


@pytest.mark.parametrize("width, names", [(300, ["tile_kernel"]), (32769, ["fold_kernel", "update_kernel"])])
def test_a_tile_that_is_one_segment_wide_is_one_launch(width, names, monkeypatch):
    x, y, tokens = batch(1, width)
    launches = Launches(monkeypatch)
    kernels.update_states(Pair(x, y, tokens, None, 1.0, width), 0, states.empty(1, DEVICE))
    assert launches.names == names


def update_in_two_launches(pair, first_column, fields):
    """As `update_states`, of a tile that is wider than a segment."""
    from cmdp_fast.kernels import finish, launch, token_state

    folded = token_state.fold_rows(pair, launch.logits_of(pair))
    settings = {"ROWS": finish.ROWS, "PARTS": token_state.parts(folded), **launch.compiled_for(finish.WARPS)}
    token_state.update_kernel[(1,)](count_rows(pair.student), folded, fields, first_column, **settings)


@pytest.mark.parametrize("aligned", [True, False])
def test_one_launch_gives_the_states_that_two_give(aligned):
    """Special values and flags included; the second tile of each row meets the state of the first."""
    width, rows = 1004, 7
    x, y = (make_logits(rows, width + 4, dtype=torch.float32, seed=seed).to(DEVICE) for seed in range(2))
    x[0], y[1], x[2, 5], y[3, 7], x[4, 9], y[5] = -torch.inf, -torch.inf, -torch.inf, -torch.inf, torch.nan, -3e38
    x, y = (t[:, :width] if aligned else t[:, 3 : 3 + width] for t in (x, y))
    tokens = torch.tensor([0, 400, 503, 504, 900, 1003, 7], device=DEVICE)
    mask = torch.tensor([True] * 6 + [False], device=DEVICE)
    one, two = states.empty(rows, DEVICE), states.empty(rows, DEVICE)
    for first, scale in ((0, 1.0), (width, 1.5)):
        pair = Pair(scale * x, scale * y, tokens + width, mask, 0.7, width)
        kernels.update_states(pair, first, one)
        update_in_two_launches(pair, first, two)
        assert torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one[6], states.empty(1, DEVICE)[0])
    flags = one[:, [states.FIELDS.index(name) for name in ("r_inf", "f_inf", "exact")]]
    assert flags.any(0).all() and not flags.all(0).any()


@pytest.mark.parametrize("width", [8, 1031, 2055, 6135, 6136])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_the_tail_of_a_row_counts_every_column_once(width, dtypes):
    """Whole steps, vectors and single columns, where rows are aligned and where they are not: logits of 0 and of one
    column that is higher, at each place where a lane takes another way to read."""
    x, y = (torch.zeros(1, width + 16, dtype=dtype, device=DEVICE) for dtype in dtypes)
    for start in (0, 1):
        whole = width // 8 * 8
        for column in {0, whole - 1, min(whole, width - 1), width - 1}:
            a, b = (t.clone()[:, start : start + width] for t in (x, y))
            a[0, column], b[0, column] = 2.0, 3.0
            stats = cf.token_stats(a, b, torch.tensor([column], device=DEVICE), backend="triton")
            for logprob, top in ((stats.logprob, 2.0), (stats.teacher_logprob, 3.0)):
                assert logprob.item() == pytest.approx(top - math.log(width - 1 + math.exp(top)), abs=1e-5), column


def test_sequences_longer_than_a_chunk():
    cost = make_logits(2, 2500, scale=1.0).abs().to(DEVICE)
    mask = make_tokens(2, 2500, vocab=3).bool().to(DEVICE)
    for settings in ({}, {"reduction": "mean"}, {"gamma": 0.999}):
        got, want = (cf.budget_trace(cost, 900.0, mask=mask, backend=name, **settings) for name in ("triton", "torch"))
        for name, a, b in zip(got._fields, got, want, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=2e-4), name
        for kind, coefficient in (("cmdp", 0.25), ("barrier", 0.5)):
            rule = {"kind": kind, "coefficient": coefficient, "mask": mask}
            rewards = [
                cf.modified_reward(torch.ones_like(cost), cost, t, backend=name, **rule)
                for name, t in (("triton", got), ("torch", want))
            ]
            assert torch.allclose(*rewards, rtol=1e-4, atol=1e-3), kind


def test_float64_is_left_to_pytorch():
    x = make_logits(2, 9, dtype=torch.float64).to(DEVICE)
    for pair in ((x, x), (x, x.float()), (x.float(), x)):
        with pytest.raises(ValueError, match="got float64; use backend='torch'"):
            cf.token_stats(*pair, torch.zeros(2, dtype=torch.int64, device=DEVICE), backend="triton")
        with pytest.raises(ValueError, match="got float64; use backend='torch'"):
            cf.divergence(*pair, backend="triton")


OPS = torch.ops.cmdp_fast
WEIGHTS = Mixture(0.5, 0.5, 0.5)


def call(name, *given):
    """An operator as torch sees it: the fields of all that is given, one after the other."""
    return getattr(OPS, name)(*flatten(given))


def samples():
    """The operators and their arguments as torch sees them, on the backend under test."""
    if kernels is None:
        return
    x, y, tokens = batch(6, 37, torch.float32)
    x, y, tokens = x.view(2, 3, 37), y.view(2, 3, 37), tokens.view(2, 3)
    mask, reward = torch.tensor([[True] * 3, [True, False, True]], device=DEVICE), torch.ones(2, 3, device=DEVICE)
    pair = Pair(x, y, tokens, mask, 1.0, 37)
    leaf = pair._replace(student=x.clone().requires_grad_())
    *_, saved = call("token_stats", pair, False, "triton")
    no_tokens = pair._replace(tokens=None)
    _, also_saved, mean = call("mixture_divergence", no_tokens, WEIGHTS, "triton")
    yield "token_stats", (leaf, False, "triton")
    yield "token_stats_backward", (pair, saved, Upstream(reward, None, reward, None), "triton")
    copy = pair._replace(student=x.clone())
    yield "token_stats_backward_", (copy, saved, Upstream(None, reward, None, reward), "triton")
    yield "mixture_divergence", (leaf._replace(tokens=None), WEIGHTS, "triton")
    yield "mixture_divergence_backward", (no_tokens, WEIGHTS, "triton", also_saved, mean, reward)
    rules = BudgetRule(1.0, False, False), RewardRule("cmdp", True, 1.0, 1.0, 0.0, 10.0)
    yield "constrained_pass", (leaf, reward, None, None, 0.5, "reverse_kl", False, rules, False, "triton")


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda v: v if isinstance(v, str) else "")
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, tuple(flatten(arguments)))


# --------------------------------------------------------------------------------------------------------------
# Without a GPU: shapes and strides of tensors that only pretend to be on one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_on_a_gpu(dtype):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 40, dtype=dtype, device="cuda").narrow(2, 0, 37)
        y = torch.empty(3, 2, 37, dtype=dtype, device="cuda").transpose(0, 1)
        tokens, reward = torch.zeros(2, 3, dtype=torch.int64, device="cuda"), torch.zeros(2, 3, device="cuda")
        for cost in ("reverse_kl", "k3", "jsd"):
            out = cf.constrained_reward(x, y, tokens, reward, 1.0, cost=cost)
            for t in (*out.stats, *out.trace[:3], out.trace.excess, out.reward):
                assert t.device.type == "cuda" and t.shape == (2, 3) and t.stride() == (3, 1)
            assert out.trace.first_violation.shape == (2,) and out.trace.violated.dtype == torch.bool
        # Not by way of autograd, whose engine wants a real device.
        pair = Pair(x, y, tokens, None, 1.0, 37)
        *_, saved = call("token_stats", pair, False, "triton")
        _, _, mean = call("mixture_divergence", pair, WEIGHTS, "triton")
        for gradient in (
            call("token_stats_backward", pair, saved, Upstream(reward, None, None, reward), "triton"),
            call("mixture_divergence_backward", pair, WEIGHTS, "triton", saved, mean, reward),
        ):
            assert gradient.shape == x.shape and gradient.stride() == (111, 37, 1) and gradient.dtype == dtype


def test_compile_traces_the_whole_graph_for_a_gpu():
    """torch.compile(fullgraph=True) as far as it goes without a device: the graph, its shapes and strides."""
    seen = []

    def record(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def step(x, y, tokens, reward):
        out = cf.constrained_reward(x, y, tokens, reward, 1.0)
        return out.reward, out.stats.reverse_kl, cf.divergence(x, y)

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = (torch.empty(2, 3, 37, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        tokens, reward = torch.zeros(2, 3, dtype=torch.int64, device="cuda"), torch.zeros(2, 3, device="cuda")
        for t in step(x, y, tokens, reward):
            assert t.device.type == "cuda" and t.shape == (2, 3) and t.stride() == (3, 1) and t.dtype == torch.float32
    assert len(seen) == 1 and sum("constrained_pass" in str(target) for target in seen[0]) == 1


def test_nothing_that_tells_where_rows_begin_is_1():
    """To Triton 3.6 an integer of 1 in a tuple within a tuple is None: kernels would not compile for it."""
    expanded = torch.empty(1, 9, device=DEVICE).expand(4, 9)
    for t in (
        expanded,
        *(torch.empty(s, device=DEVICE) for s in ((1, 7), (5, 1), (1, 1), (2, 3, 1), (2, 1, 1), (4, 2, 5))),
    ):
        for rows in (t, t[..., :1], t[:1]):
            assert 1 not in kernels.launch.rows_of(rows)[1], rows.stride()
