"""What every rank of test_heads_parallel.py does: a sharded or replicated model against one that is neither.

Each rank has rows of its own, and knows those of all others: gradients are the mean over ranks.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_worker import scattered_mean
from tiny_models import BASE, tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import cmdp_fast as cf

HALF, FULL = torch.bfloat16, torch.float32
POLICIES = {
    "float32": MixedPrecisionPolicy(),
    "half": MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=FULL, output_dtype=FULL),
    "half outside": MixedPrecisionPolicy(output_dtype=HALF),  # a cast that loses bits
}
GROUPS = {  # what is sharded before the root
    "root": lambda model: [],
    "layers": lambda model: list(model.model.layers),
    "layers and head": lambda model: [*model.model.layers, model.lm_head],
}


def run(rank: int, world: int, store: str, check: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(rank, world)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- what is computed


def rows(rank: int) -> Tensor:
    return torch.randint(3, BASE["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(rank))


def of_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return cf.last_hidden_state(model, ids).sin().sum()  # the sum of squares is constant after an RMS norm


def of_statistics(model: nn.Module, ids: Tensor) -> Tensor:
    """The head's gradient too. All ranks have the same tokens, so that rows of their own are not told by them."""
    teacher = tiny(seed=3)
    with torch.no_grad():
        theirs, their_head = cf.last_hidden_state(teacher, ids), cf.head_of(teacher)
    hidden = cf.last_hidden_state(model, ids)
    head = cf.head_of(model)
    stats = cf.linear_token_stats(hidden, head, theirs, their_head, torch.ones_like(ids))
    return (stats.reverse_kl + stats.logprob).sum()


def mean_gradients(plain: nn.Module, loss: Callable[..., Tensor], world: int) -> dict[str, Tensor]:
    model = copy.deepcopy(plain)
    (sum(loss(model, rows(rank)) for rank in range(world)) / world).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def same(model: nn.Module, expected: dict[str, Tensor], relative: float, case: Any) -> None:
    """To a part of the largest number of each gradient. The names are the plain model's."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor), (case, name)
            found[plain_name(name)] = parameter.grad.full_tensor()
        elif parameter.grad is not None:
            assert not any(hasattr(module, "unshard") for module in model.modules()), (case, name, "was not reduced")
            found[plain_name(name)] = parameter.grad
    for name in found.keys() - expected.keys():  # the head's, which an empty product reaches
        assert not found[name].any(), (case, name)
    for name, gradient in expected.items():
        assert name in found, (case, name)
        off, largest = (found[name].float() - gradient).abs().max(), gradient.abs().max()
        assert off <= relative * largest, (case, name, float(off), float(largest))


def plain_name(name: str) -> str:
    return re.sub(r"\b(_checkpoint_wrapped_|_fsdp_wrapped_)?module\.", "", name)


# ------------------------------------------------------------------------------------- wrappers


def checkpointed(model: nn.Module) -> nn.Module:
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    return model


def fully_sharded(rank: int, world: int) -> None:
    mesh, unit = init_device_mesh("cpu", (world,)), scattered_mean(world)
    for policy, tied in (("float32", False), ("float32", True), ("half", False), ("half outside", False)):
        plain = tiny(tie_word_embeddings=tied)
        for parameter in plain.parameters() if policy == "half" else ():
            parameter.data = parameter.to(HALF)  # FSDP leaves buffers as they are
        with torch.no_grad():
            hidden = cf.last_hidden_state(plain, rows(rank))
        for loss in (of_hidden, of_statistics):
            expected = {name: unit * mean for name, mean in mean_gradients(plain, loss, world).items()}
            recomputed = (False, True) if loss is of_statistics and policy == "float32" and not tied else (False,)
            for (name, parts), reshard, again in itertools.product(GROUPS.items(), (True, False, None), recomputed):
                if tied and "head" in name:
                    continue  # FSDP2 refuses a parameter in two groups
                case = (policy, tied, loss.__name__, name, reshard, again)
                model = tiny(tie_word_embeddings=tied)
                for part in (*parts(model), model):
                    outside = POLICIES[policy].output_dtype if part is model else None
                    precision = replace(POLICIES[policy], output_dtype=outside)
                    fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision)
                if again:
                    checkpointed(model)
                for _ in range(2):
                    found = cf.last_hidden_state(model, rows(rank))
                    assert found.dtype == hidden.dtype and torch.equal(found, hidden), case
                    loss(model, rows(rank)).backward()
                    same(model, expected, 1e-5 if policy == "float32" else 2**-5, case)
                    model.zero_grad()  # of the shards, which are the parameters now


def replicated(rank: int, world: int) -> None:
    """DDP, whose hooks stand on what the model returns where it looks for unused parameters or has a static graph."""
    plain = tiny()
    looking, static = {"find_unused_parameters": True}, {"static_graph": True}
    for loss, options in ((of_statistics, {}), (of_statistics, looking), (of_statistics, static), (of_hidden, looking)):
        expected = mean_gradients(plain, loss, world)
        for again in (False, True):
            model = checkpointed(copy.deepcopy(plain)) if again else copy.deepcopy(plain)
            wrapped = nn.parallel.DistributedDataParallel(model, **options)
            for _ in range(3):
                wrapped.zero_grad()
                loss(wrapped, rows(rank)).backward()
                same(wrapped, expected, 1e-5, (loss.__name__, options, again))


def adapted(rank: int, world: int) -> None:
    """PEFT calls its model's forward past the hooks of that model."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(tiny(), settings)
    for loss in (of_hidden, of_statistics):
        expected = {name: scattered_mean(world) * mean for name, mean in mean_gradients(plain, loss, world).items()}
        assert expected
        for parts in (lambda model: [], lambda model: list(model.base_model.model.model.layers)):
            model = copy.deepcopy(plain)
            for part in (*parts(model), model):
                fully_shard(part, mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=True)
            loss(model, rows(rank)).backward()
            same(model, expected, 1e-5, (loss.__name__, len(parts(model))))


def sharded_by_the_older(rank: int, world: int) -> None:
    """FSDP's first version, which gathers for the backward pass when the gradient of an output arrives."""
    plain = tiny()
    expected = mean_gradients(plain, of_hidden, world)
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        for nested in (False, True):
            policy = ModuleWrapPolicy({type(plain.model.layers[0])}) if nested else None
            model = FullyShardedDataParallel(
                copy.deepcopy(plain),
                auto_wrap_policy=policy,
                sharding_strategy=strategy,
                use_orig_params=True,
                device_id=torch.device("cpu"),
            )
            for _ in range(2):
                model.zero_grad()
                of_hidden(model, rows(rank)).backward()
                with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                    same(model, expected, 1e-5, (strategy, nested))
