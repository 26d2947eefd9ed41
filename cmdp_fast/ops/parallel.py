"""A vocabulary whose columns lie on several ranks: which rank holds which, and the states of all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Alike(NamedTuple):
    """Settings that all ranks must have alike, under the names that an error gives them."""

    temperature: float
    dtype: torch.dtype  # of the statistics
    reduce_hidden_grad: bool = False


def columns(
    student_width: int,
    teacher_width: int,
    vocab_size: int | None,
    process_group: dist.ProcessGroup | None,
    first_column: int,
    tokens: Tensor,
    mask: Tensor | None,
    alike: Alike,
) -> tuple[int, int]:
    """How many of this rank's columns count, and how many there are on all ranks together."""
    checks.machine_integer("first_column", first_column)
    if process_group is None:
        if first_column != 0:
            raise ValueError(f"first_column={first_column} has a meaning only with process_group=")
        width = common_width(student_width, teacher_width, vocab_size)
        return width, width
    common = width = min(student_width, teacher_width)
    if vocab_size is not None:
        checks.machine_integer("vocab_size", vocab_size)
        width = max(0, min(common, vocab_size - first_column))
    fits = vocab_size is not None or student_width == teacher_width
    mine = _Shard(first_column, width, -1 if vocab_size is None else max(0, vocab_size), fits)
    total = _agree(process_group, mine, tokens, mask, alike)
    check_widths(student_width, teacher_width, vocab_size)
    if vocab_size is not None and total != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}, but the ranks hold {total} columns of it")
    return width, total


class _Shard(NamedTuple):
    """What a rank says of its columns; all ranks hear of it, so that all of them refuse what one would."""

    first_column: int
    width: int  # columns that count
    vocab_size: int  # -1: none was given
    fits: bool  # whether both models are equally wide, where they have to be


def _agree(process_group: dist.ProcessGroup, mine: _Shard, tokens: Tensor, mask: Tensor | None, alike: Alike) -> int:
    """Checks that the ranks hold adjoining columns of the same tokens; how many columns there are.

    One small exchange before any work. It is what catches a head sharded for FSDP, whose ranks hold different tokens,
    and ranks that all begin at column 0: both would otherwise give wrong numbers, or wait for each other.
    """
    counted = tokens.flatten().double() if mask is None else tokens.flatten().double().masked_fill(~mask.flatten(), -1)
    weights = torch.arange(1, len(counted) + 1, device=tokens.device) % 1009 + 1
    print_ = float((counted * weights).sum())
    told = _exchanged(process_group, [len(counted), print_, *mine, *_numbers(alike)], tokens.device)
    if any(numbers[:2] != told[0][:2] for numbers in told):
        raise ValueError(
            "the ranks of process_group hold different tokens or masks; each must hold the same rows and its own "
            "columns of the vocabulary (for a head sharded by FSDP pass the whole head, "
            "weight.full_tensor(grad_placements=[Partial('avg')]))"
        )
    shards = [_Shard(int(n[2]), int(n[3]), int(n[4]), bool(n[5])) for n in told]
    _check_alike("vocab_size", [None if shard.vocab_size == -1 else shard.vocab_size for shard in shards])
    _check_settings([numbers[6:] for numbers in told])
    if not all(shard.fits for shard in shards):
        where = ", ".join(str(rank) for rank, shard in enumerate(shards) if not shard.fits)
        raise ValueError(
            f"student and teacher differ in width on the ranks {where} of process_group; pass vocab_size= to compare "
            "them over a common prefix"
        )
    end = 0
    for shard in sorted(shard for shard in shards if shard.width > 0):
        if shard.first_column != end:
            spans = ", ".join(f"[{s.first_column}, {s.first_column + s.width})" for s in shards)
            raise ValueError(f"the columns of the ranks must adjoin and begin at 0, got {spans}; pass first_column=")
        end += shard.width
    return end


def check_states(process_group: dist.ProcessGroup, rows: int, alike: Alike, device: torch.device) -> None:
    """Checks that the ranks hold states of as many rows, of the same settings. One small exchange."""
    told = _exchanged(process_group, [rows, *_numbers(alike)], device)
    _check_alike("number of rows", [int(numbers[0]) for numbers in told])
    _check_settings([numbers[1:] for numbers in told])


def _exchanged(process_group: dist.ProcessGroup, numbers: list[float], device: torch.device) -> list[list[float]]:
    """The numbers of every rank."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, mine, group=process_group)
    told: list[list[float]] = torch.stack(everyone).tolist()
    return told


def _numbers(alike: Alike) -> list[float]:
    return [alike.temperature, alike.dtype == torch.float64, alike.reduce_hidden_grad]


def _check_settings(told: list[list[float]]) -> None:
    settings = [Alike(t, torch.float64 if wide else torch.float32, bool(reduce)) for t, wide, reduce in told]
    for name in Alike._fields:
        _check_alike(name, [getattr(setting, name) for setting in settings])


def _check_alike(name: str, values: list[Any]) -> None:
    """Raises ValueError for what differs from rank to rank."""
    if any(value != values[0] for value in values):
        given = ", ".join(map(str, values))
        raise ValueError(f"the ranks of process_group must have the same {name}, got {given} on the ranks in turn")
