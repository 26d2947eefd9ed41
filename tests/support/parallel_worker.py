"""What every rank of test_parallel.py does: its own columns against the whole vocabulary, which it computes as well."""

import itertools

import pytest
import torch
import torch.distributed as dist
from half_products import keep_halves
from helpers import DIFFERENTIABLE, make_logits, poisoned_memory, weighted_sum
from linear_inputs import evaluate, make_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import cmdp_fast as cf

VOCAB, INF = 50, torch.inf
BOUNDS = {2: (0, 7, 50), 3: (0, 20, 21, 50)}
ROWS = ("student_hidden", "teacher_hidden", "tokens")
CLOSE = {"rtol": 1e-5, "atol": 3e-6}


def run(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        with poisoned_memory():
            check(dist.group.WORLD, rank, world)
    finally:
        dist.destroy_process_group()


def check(group, rank: int, world: int) -> None:
    first, end = BOUNDS[world][rank : rank + 2]
    for backend in ("torch", "cpu"):
        if cf.available_backends()[backend] is None:
            linear(group, first, end, backend)
            logits(group, first, end, backend)
            state(group, first, end, backend)
            common_prefix(group, first, end, backend)
            no_rows(group, first, end, backend)
    halves(group, first, end)
    sharded_head(world)
    gathered_head(rank, world)
    refusals(group, rank, first, end)


def model(dtype=torch.float32):
    """Tokens on every rank, a masked row, columns that one model or both may not use, on either side of a boundary."""
    inputs = make_inputs(rows=(2, 4), vocab=VOCAB, student=dtype, teacher=dtype, biased=True)
    inputs["tokens"] = torch.tensor([[0, 6, 7, 19], [20, 21, 49, 30]])
    for part, columns in (("student_bias", (3, 40)), ("teacher_bias", (3, 8))):
        inputs[part][list(columns)] = -INF
    inputs["teacher_bias"][8] = 0.5 if dtype == torch.bfloat16 else -INF  # without it no divergence is infinite
    return inputs, torch.tensor([[True, True, True, True], [True, True, True, False]])


def shard(inputs, first, end):
    parts = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
    return {name: value[first:end] if name in parts else value for name, value in inputs.items()}


def same(ours, whole) -> None:
    for name, a, b in zip(whole._fields, ours, whole, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def linear(group, first, end, backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, mask = model(dtype)
        options = {"mask": mask, "temperature": 0.8, "backend": backend}
        whole, expected = evaluate(cf.linear_token_stats, inputs, **options)
        mine = shard(inputs, first, end)
        spread = {"process_group": group, "first_column": first}
        close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        for reduce in (True, False):
            stats, gradients = evaluate(cf.linear_token_stats, mine, reduce_hidden_grad=reduce, **options, **spread)
            same(stats, whole)
            hidden = gradients["student_hidden"]
            if not reduce:
                dist.all_reduce(hidden, group=group)
            torch.testing.assert_close(hidden, expected["student_hidden"], **close)
            for name in ("student_weight", "student_bias"):
                torch.testing.assert_close(gradients[name], expected[name][first:end], **close)


def halves(group, first, end) -> None:
    """As on a GPU, where half-precision factors are not widened: the gradient of hidden states is summed in float32."""
    inputs, mask = model(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        keep_halves(patch)
        for saved in ("recompute", "teacher", "tiles"):
            options = {"mask": mask, "saved": saved, "backend": "torch"}
            whole, expected = evaluate(cf.linear_token_stats, inputs, **options)
            stats, gradients = evaluate(
                cf.linear_token_stats, shard(inputs, first, end), process_group=group, first_column=first, **options
            )
            same(stats, whole)
            for name, gradient in gradients.items():
                mine = expected[name] if name in ROWS else expected[name][first:end]
                torch.testing.assert_close(gradient, mine, rtol=2**-7, atol=2**-9, msg=f"{saved}, {name}")


def logits(group, first, end, backend) -> None:
    x, y = make_logits(2, 4, VOCAB), make_logits(2, 4, VOCAB, seed=1)
    x[..., 40], y[0, :, 8] = -INF, -INF
    x[1, 0, 5] = torch.nan
    _, mask = model()
    tokens = torch.tensor([[0, 6, 7, 19], [20, 21, 49, 30]])
    gradients, results = [], []
    for columns, spread in (
        (slice(None), {}),
        (slice(first, end), {"process_group": group, "first_column": first}),
    ):
        leaf = x[..., columns].clone().requires_grad_()
        stats = cf.token_stats(leaf, y[..., columns], tokens, mask=mask, temperature=0.8, backend=backend, **spread)
        weights = {name: make_logits(2, 4, scale=1.0, seed=i) for i, name in enumerate(DIFFERENTIABLE)}
        gradients.append(torch.autograd.grad(weighted_sum(stats, weights), leaf)[0])
        results.append(stats)
    for whole, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, equal_nan=True, **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0][..., first:end], equal_nan=True, **CLOSE)
    assert gradients[1][1, 0].isnan().all() and not gradients[1][1, 3].any()


def state(group, first, end, backend) -> None:
    x, y, tokens = make_logits(5, VOCAB), make_logits(5, VOCAB, seed=1), torch.tensor([0, 7, 20, 25, 49])
    mine = cf.TokenState.empty(5)
    mine.update(x[:, first:end], y[:, first:end], tokens, first_column=first, backend=backend)
    same(mine.finish(process_group=group), cf.token_stats(x, y, tokens))
    same(mine.finish(), cf.token_stats(x, y, tokens))


def common_prefix(group, first, end, backend) -> None:
    """Ranks beyond the prefix hold nothing of it."""
    inputs, mask = model()
    inputs["tokens"] = inputs["tokens"] % 7
    for vocab_size in (7, 30):
        options = {"vocab_size": vocab_size, "mask": mask, "backend": backend}
        whole, expected = evaluate(cf.linear_token_stats, inputs, **options)
        stats, gradients = evaluate(
            cf.linear_token_stats, shard(inputs, first, end), process_group=group, first_column=first, **options
        )
        same(stats, whole)
        torch.testing.assert_close(gradients["student_weight"], expected["student_weight"][first:end], **CLOSE)
        torch.testing.assert_close(gradients["student_hidden"], expected["student_hidden"], **CLOSE)


def no_rows(group, first, end, backend) -> None:
    """No row counts: all is exactly 0. On ranks beyond the common prefix nothing else could be."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs, mask = model(dtype)
        options = {"mask": torch.zeros_like(mask), "process_group": group, "first_column": first, "backend": backend}
        for vocab_size, saved in itertools.product((VOCAB, 7), ("recompute", "tiles")):
            stats, gradients = evaluate(
                cf.linear_token_stats, shard(inputs, first, end), vocab_size=vocab_size, saved=saved, **options
            )
            assert not any(t.any() for t in (*stats, *gradients.values()))  # NaN is not 0
        leaf = make_logits(2, 4, VOCAB, dtype=dtype)[..., first:end].requires_grad_()
        stats = cf.token_stats(leaf, leaf.detach(), inputs["tokens"], **options)
        weighted_sum(stats, dict.fromkeys(DIFFERENTIABLE, 1.0)).backward()
        assert not any(t.any() for t in (*stats, leaf.grad))


def sharded_head(world) -> None:
    inputs, mask = model()
    whole, expected = evaluate(cf.linear_token_stats, inputs, mask=mask)
    mesh = init_device_mesh("cpu", (world,))
    shards = {
        name: value if "hidden" in name or name == "tokens" else distribute_tensor(value, mesh, [Shard(0)])
        for name, value in inputs.items()
    }
    stats, gradients = evaluate(cf.linear_token_stats, shards, mask=mask)
    same(stats, whole)
    for name, gradient in gradients.items():
        assert isinstance(gradient, DTensor) == (name != "student_hidden")
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(full, expected[name], **CLOSE)
    with pytest.raises(ValueError, match="all of them must be"):
        cf.linear_token_stats(**{**shards, "teacher_bias": inputs["teacher_bias"]})
    with pytest.raises(ValueError, match="brings its own process group"):
        cf.linear_token_stats(**shards, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"sharded over its rows, \[Shard\(0\)\]"):
        cf.linear_token_stats(**{**shards, "student_weight": shards["student_weight"].redistribute(mesh, [Shard(1)])})


def gathered_head(rank, world) -> None:
    """FSDP: each rank has rows of its own and a part of the head, whose gradient is the mean over all rows."""
    inputs, _ = model()
    weight = inputs.pop("student_weight")
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (world,)), [Shard(0)]).requires_grad_()
    whole = weight.clone().requires_grad_()
    inputs["teacher_bias"] = inputs["student_bias"] = None

    def loss(head, row):
        rows = {name: value[row : row + 1] if name in ROWS else value for name, value in inputs.items()}
        return cf.linear_token_stats(student_weight=head, **rows).reverse_kl.sum()

    loss(sharded.full_tensor(grad_placements=[Partial("avg")]), rank % 2).backward()
    mean = sum(loss(whole, r % 2) for r in range(world)) / world
    (scattered_mean(world) * mean).backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, **CLOSE)


def scattered_mean(world: int) -> float:
    """What gloo gives each rank for its part of the mean of ones: with torch 2.8 their sum."""
    part = torch.zeros(1)
    dist.reduce_scatter_tensor(part, torch.ones(world), op=dist.ReduceOp.AVG)
    return part.item()


def refusals(group, rank, first, end) -> None:
    """Every rank refuses, before any of them waits for another."""
    inputs, _ = model()
    mine = shard(inputs, first, end)
    with pytest.raises(ValueError, match="columns of the ranks must adjoin and begin at 0"):
        cf.linear_token_stats(**mine, process_group=group)
    with pytest.raises(ValueError, match=r"hold different tokens or masks.*full_tensor"):
        cf.linear_token_stats(
            **{**mine, "tokens": (inputs["tokens"] + rank) % VOCAB}, process_group=group, first_column=first
        )
    with pytest.raises(ValueError, match="hold different tokens or masks"):
        rows = {
            name: value[:, : rank + 1] if "hidden" in name or name == "tokens" else value
            for name, value in mine.items()
        }
        cf.linear_token_stats(**rows, process_group=group, first_column=first)
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 50\)"):
        cf.linear_token_stats(**{**mine, "tokens": inputs["tokens"] + 1}, process_group=group, first_column=first)
    with pytest.raises(ValueError, match="vocab_size=60, but the ranks hold 50 columns"):
        cf.linear_token_stats(**mine, vocab_size=60, process_group=group, first_column=first)
    differing(group, rank, mine, first)


def differing(group, rank, mine, first) -> None:
    """What ranks are given must be alike where one rank's numbers have a say in another's: all of them raise."""
    other, own = {"process_group": group, "first_column": first}, rank == 1
    wide = mine["student_weight"].double() if own else mine["student_weight"]
    longer = torch.cat([mine["teacher_weight"]] * 2) if own else mine["teacher_weight"]
    for change, message in (
        ({"vocab_size": 49 + rank}, "must have the same vocab_size, got 49, 50"),
        ({"vocab_size": 50 if own else None}, "must have the same vocab_size, got None, 50"),
        ({"temperature": 1.0 + rank * 2.0**-52}, "must have the same temperature, got 1.0, 1.0000000000000002"),
        ({"student_weight": wide}, r"must have the same dtype, got torch.float32, torch.float64"),
        ({"reduce_hidden_grad": not own}, "must have the same reduce_hidden_grad, got True, False"),
        ({"teacher_weight": longer, "teacher_bias": None}, "student and teacher differ in width on the ranks 1 of"),
    ):
        with pytest.raises(ValueError, match=message):
            cf.linear_token_stats(**{**mine, **change}, **other)
    x, tokens = make_logits(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must have the same temperature, got 1.0, 3.0"):
        cf.token_stats(x, x, tokens, temperature=1.0 + 2 * rank, process_group=group, first_column=4 * rank)
    for state, message in (
        (cf.TokenState.empty(4 + rank), "must have the same number of rows, got 4, 5"),
        (cf.TokenState.empty(4, temperature=1.0 + rank), "must have the same temperature, got 1.0, 2.0"),
        (cf.TokenState(cf.TokenState.empty(4).fields, 1.0, (torch.float32, torch.float64)[rank % 2]), "the same dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            state.finish(group)
