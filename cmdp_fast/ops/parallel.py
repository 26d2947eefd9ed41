"""A vocabulary whose columns lie on several ranks: which rank holds which, and the states of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks, states
from cmdp_fast.compiling import replaced
from cmdp_fast.heads import Head
from cmdp_fast.ops.projection import check_widths, common_width

_PLAIN = (Tensor, torch.nn.Parameter)


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """A group as an operator takes it: by name, empty for none."""
    return "" if process_group is None else process_group.group_name


def group_named(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_reduced(fields: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """The states of all ranks' columns: one all-reduce of the maxima, one of the sums raised to them."""
    maxima = torch.cat((fields[:, states.REFERENCES], fields[:, states.LATEST]), dim=1)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=process_group)
    references, latest = maxima[:, states.REFERENCES], maxima[:, states.REFERENCES.stop :]
    sums = states.raised(fields, references)[:, states.SUMS].contiguous()
    dist.all_reduce(sums, group=process_group)
    return torch.cat((references, sums, latest), dim=1)


def shards(*heads: Head) -> tuple[list[Head], dist.ProcessGroup, int] | None:
    """The local parts of heads that are DTensors, their group and first column; None if none is one."""
    if not any_sharded(*heads):
        return None
    tensors = [t for head in heads for t in (head.weight, head.bias) if t is not None]
    if not all(isinstance(t, _dtensor()) for t in tensors):
        raise ValueError("if one head or bias is a DTensor, all of them must be, sharded alike")
    mesh, rows = tensors[0].device_mesh, {t.shape[0] for t in tensors}  # type: ignore[attr-defined]
    for t in tensors:
        if t.device_mesh != mesh or mesh.ndim != 1 or not t.placements[0].is_shard(0):  # type: ignore[attr-defined]
            raise ValueError(
                "a DTensor head must be sharded over its rows, [Shard(0)], on one one-dimensional mesh, got "
                f"{t.placements} on {t.device_mesh}"  # type: ignore[attr-defined]
            )
    if len(rows) > 1:
        raise ValueError(f"DTensor heads must be equally wide, or their shards do not match, got {sorted(rows)} rows")
    # Shard(0) deals rows out as torch.chunk does.
    piece = -(-tensors[0].shape[0] // mesh.size())
    first_column = min(piece * mesh.get_local_rank(), tensors[0].shape[0])
    local = [replaced(head, weight=_local(head.weight), bias=_local(head.bias)) for head in heads]
    return local, mesh.get_group(), first_column


def any_sharded(*heads: Head) -> bool:
    """Whether a head or bias is a DTensor."""
    # Before the import, which takes half a second: what most heads are
    unusual = [t for head in heads for t in (head.weight, head.bias) if t is not None and type(t) not in _PLAIN]
    return dist.is_available() and any(isinstance(t, _dtensor()) for t in unusual)


def _local(t: Any) -> Any:
    return None if t is None else t.to_local()


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def columns(
    student_width: int,
    teacher_width: int,
    vocab_size: int | None,
    process_group: dist.ProcessGroup | None,
    first_column: int,
    tokens: Tensor,
    mask: Tensor | None,
) -> tuple[int, int]:
    """How many of this rank's columns count, and how many there are on all ranks together."""
    checks.integer("first_column", first_column)
    check_widths(student_width, teacher_width, vocab_size)
    if process_group is None:
        if first_column != 0:
            raise ValueError(f"first_column={first_column} has a meaning only with process_group=")
        width = common_width(student_width, teacher_width, vocab_size)
        return width, width
    if first_column < 0:
        raise ValueError(f"first_column must be at least 0, got {first_column}")
    common = width = min(student_width, teacher_width)
    if vocab_size is not None:
        checks.integer("vocab_size", vocab_size)
        width = max(0, min(common, vocab_size - first_column))
    total = _agree(process_group, first_column, width, tokens, mask)
    if vocab_size is not None and total != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}, but the ranks hold {total} columns of it")
    return width, total


def _agree(process_group: dist.ProcessGroup, first_column: int, width: int, tokens: Tensor, mask: Tensor | None) -> int:
    """Checks that the ranks hold adjoining columns of the same tokens; how many columns there are.

    One small exchange before any work. It is what catches a head sharded for FSDP, whose ranks hold different tokens,
    and ranks that all begin at column 0: both would otherwise give wrong numbers, or wait for each other.
    """
    counted = tokens.flatten().double() if mask is None else tokens.flatten().double().masked_fill(~mask.flatten(), -1)
    weights = torch.arange(1, len(counted) + 1, device=tokens.device) % 1009 + 1
    print_ = float((counted * weights).sum())
    mine = torch.tensor([len(counted), print_, first_column, width], dtype=torch.float64, device=tokens.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, mine, group=process_group)
    facts = torch.stack(everyone).tolist()
    if any(fact[:2] != facts[0][:2] for fact in facts):
        raise ValueError(
            "the ranks of process_group hold different tokens or masks; each must hold the same rows and its own "
            "columns of the vocabulary (for a head sharded by FSDP pass the whole head, "
            "weight.full_tensor(grad_placements=[Partial('avg')]))"
        )
    end = 0
    for first, size in sorted((int(fact[2]), int(fact[3])) for fact in facts if fact[3] > 0):
        if first != end:
            spans = ", ".join(f"[{int(f[2])}, {int(f[2] + f[3])})" for f in facts)
            raise ValueError(f"the columns of the ranks must adjoin and begin at 0, got {spans}; pass first_column=")
        end = first + size
    return end
