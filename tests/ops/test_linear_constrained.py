"""linear_constrained_reward is the three operations called in turn, and checks everything before it computes."""

import pytest
import torch
import torch.distributed as dist
from helpers import make_logits
from linear_inputs import make_inputs
from torch.distributed.tensor import Partial, Shard, distribute_tensor, init_device_mesh

import cmdp_fast as cf
from cmdp_fast.ops import linear_divergence
from cmdp_fast.ops.backends import INTERPRETED

pytestmark = pytest.mark.tiles

MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def completions(**options):
    return make_inputs(rows=(2, 5), vocab=40, **options), make_logits(2, 5, scale=1.0, seed=7)


@pytest.mark.parametrize(
    "cost, beta",
    [*((cost, 0.5) for cost in ("reverse_kl", "forward_kl", "k1", "k3", "nll")), *(("jsd", b) for b in (0, 0.3, 1))],
)
@pytest.mark.parametrize("per_token", [True] if INTERPRETED else [False, True])
def test_equals_the_three_operations_in_turn(cost, beta, per_token, backend):
    inputs, reward = completions(biased=True)
    leaves = [inputs[name].requires_grad_() for name in ("student_hidden", "student_weight")]
    mask = MASK.to(reward.device)
    settings = {"temperature": 0.7, "student_softcap": 9.0, "teacher_scale": 0.5, "mask": mask, "backend": backend}
    clamp = 0.25 if per_token and cost in ("k1", "k3", "nll") else None
    of_constraint = {
        "budget": 0.3,
        "cost": cost,
        "beta": beta,
        "cost_clamp": clamp,
        "per_token": per_token,
        "gamma": 0.9,
    }
    out = cf.linear_constrained_reward(**inputs, task_reward=reward, **of_constraint, **settings)
    stats = cf.linear_token_stats(**inputs, **settings)
    if cost == "jsd":
        models = {name: value for name, value in inputs.items() if name != "tokens"}
        paid = cf.linear_divergence(**models, kind="jsd", beta=beta, **settings).detach()
    else:
        paid = cf.token_cost(stats, cost, clamp=clamp).detach()
    assert clamp is None or paid.abs().max() == clamp
    where = {"mask": mask, "backend": backend}
    trace = cf.budget_trace(paid, 0.3, per_token=per_token, gamma=0.9, **where)
    want = (*stats, *trace, cf.modified_reward(reward, paid, trace, **where))
    for a, b in zip((*out.stats, *out.trace, out.reward), want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        torch.autograd.grad(out.stats.reverse_kl.sum(), leaves),
        torch.autograd.grad(stats.reverse_kl.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_packed_equals_padded(backend):
    inputs, reward = completions()
    mask = MASK.to(reward.device)
    padded = cf.linear_constrained_reward(
        **inputs, task_reward=reward, budget=torch.tensor([0.3, 0.1]), mask=mask, kind="hinge", backend=backend
    )
    rows = {name: value[mask] if name in ("tokens", "student_hidden", "teacher_hidden") else value
            for name, value in inputs.items()}  # fmt: skip
    packed = cf.linear_constrained_reward(
        **rows,
        task_reward=reward[mask],
        budget=torch.tensor([0.3, 0.1]),
        cu_seqlens=torch.tensor([0, 5, 8]),
        kind="hinge",
        backend=backend,
    )
    assert torch.allclose(packed.reward, padded.reward[mask], rtol=1e-6, atol=1e-6)
    assert packed.trace.violated.equal(padded.trace.violated[mask])


@pytest.mark.parametrize("saved", ["recompute", "teacher", "tiles"])
def test_logits_are_kept_only_when_asked_for(saved):
    inputs, reward = completions()
    inputs["student_hidden"].requires_grad_()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        cf.linear_constrained_reward(**inputs, task_reward=reward, budget=1.0, saved=saved)
    assert shapes.count((10, 40)) == {"recompute": 0, "teacher": 1, "tiles": 2}[saved]


def test_worst_case_fills_in_its_cost_and_reduction():
    inputs, reward = completions()
    plain = cf.linear_constrained_reward(**inputs, task_reward=reward, budget=1.0, kind="worst_case")
    named = cf.linear_constrained_reward(
        **inputs, task_reward=reward, budget=1.0, kind="worst_case", cost="nll", reduction="mean"
    )
    assert torch.equal(plain.reward, named.reward)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cost": "js"}, ValueError, "cost='js' is unknown; expected one of reverse_kl, forward_kl, jsd, k1, k3, nll"),
        ({"cost": "jsd", "beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
        (
            {"cost": "jsd", "process_group": object()},
            ValueError,
            r"linear_constrained_reward\(cost='jsd'\) takes whole heads and no process_group; linear_token_stats has",
        ),
        ({"budget": -1.0}, ValueError, "budget must be at least 0, got -1.0"),
        ({"task_reward": torch.zeros(2, 4)}, ValueError, r"task_reward must have the shape of tokens, \[2, 5\]"),
        ({"student_hidden": None}, TypeError, "student_hidden must be a tensor, got NoneType"),
        ({"teacher_hidden": torch.zeros(2, 4, 20)}, ValueError, "must agree in all but the last axis"),
        ({"kind": "saute", "coefficient": 1.0}, ValueError, "kind='saute' has no coefficient, got coefficient=1.0"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
    ],
)
def test_errors(change, error, message, monkeypatch):
    inputs, reward = completions()
    for module in (cf.ops.linear, linear_divergence):
        monkeypatch.setattr(module, "Tiles", None)  # nothing is computed
    with pytest.raises(error, match=message):
        cf.linear_constrained_reward(**{**inputs, "task_reward": reward, "budget": 1.0, **change})


def test_a_sharded_head_is_refused_for_a_mixture(one_rank):
    inputs, reward = completions()
    mesh = init_device_mesh("cpu", (1,))
    whole = {name: value for name, value in inputs.items() if name != "tokens"}
    sharded = {**whole, "student_weight": distribute_tensor(inputs["student_weight"], mesh, [Shard(0)])}
    message = r"takes whole heads, got a DTensor: pass weight.full_tensor\(grad_placements=\[Partial\('avg'\)\]\)"
    with pytest.raises(ValueError, match=rf"linear_divergence\(kind='jsd'\) {message}"):
        cf.linear_divergence(**sharded)
    settings = {"tokens": inputs["tokens"], "task_reward": reward, "budget": 1.0, "cost": "jsd"}
    with pytest.raises(ValueError, match=rf"linear_constrained_reward\(cost='jsd'\) {message}"):
        cf.linear_constrained_reward(**sharded, **settings)
    sharded["student_weight"].requires_grad_()
    gathered = sharded["student_weight"].full_tensor(grad_placements=[Partial("avg")])
    value = cf.linear_divergence(**{**sharded, "student_weight": gathered})
    assert torch.equal(value, cf.linear_divergence(**whole))
    value.sum().backward()
    leaf = inputs["student_weight"].requires_grad_()
    cf.linear_divergence(**{**whole, "student_weight": leaf}).sum().backward()
    assert torch.equal(sharded["student_weight"].grad.full_tensor(), leaf.grad)
    # A KL is that of linear_token_stats, sharded heads included.
    sharded["teacher_weight"] = distribute_tensor(inputs["teacher_weight"], mesh, [Shard(0)])
    assert torch.equal(cf.linear_divergence(**sharded, beta=1.0), cf.linear_divergence(**whole, kind="reverse_kl"))


def test_saute_warns():
    inputs, reward = completions()
    with pytest.warns(UserWarning, match="the penalty has no direct"):
        cf.linear_constrained_reward(**inputs, task_reward=reward, budget=1.0, kind="saute")


def test_compile_traces_the_whole_graph():
    inputs, reward = completions()
    compiled = torch.compile(
        lambda: cf.linear_constrained_reward(**inputs, task_reward=reward, budget=0.3).reward,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(), cf.linear_constrained_reward(**inputs, task_reward=reward, budget=0.3).reward)
