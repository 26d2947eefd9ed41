"""Prompts with padding in front: models that would count their positions from the padding on count from the first real
token, as in `generate`.

TRL gives its models ids and a mask, and no positions. Most models need none: rotations and ALiBi know distances alone,
and some count by the mask. GPT-2 and others number the columns of a batch, so a short prompt beside a long one is read
with the wrong embeddings. Which a model does is measured, and positions are then given by a hook, so that TRL's own
calls, of the student and of a reference model, are right as well.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import cmdp_fast as cf
from cmdp_fast import checks
from cmdp_fast.errors import InputError
from cmdp_fast.heads import evaluating

TOKENS, PADDING = 8, 5  # of the sequence by which a model is measured; few, for a model may have few positions


def settle_positions(trainer: Any, teacher: Any, vocab_size: int) -> dict[str, int]:
    """Sees to it that the trainer's student and the teacher read a prompt as they would without padding in front.

    A model that does so is left as it is. Where one does not, its modules that take position_ids get a hook that counts
    them, which stays on the model; the student's reference model gets the same. Runs both models on some tokens below
    ``vocab_size``, so every process must call it. Returns the number of positions of each model that has a table of
    them, by its role.

    Raises InputError for a model that the positions do not help, such as RWKV, whose state the padding changes, and for
    a table without room for a prompt before ``max_completion_length`` tokens.
    """
    roles = {"the student": trainer.model, "teacher_model": teacher}
    limits = {role: limit for role, model in roles.items() if (limit := _table_of_positions(model)) is not None}
    for role, limit in limits.items():
        if trainer.args.max_completion_length >= limit:
            raise InputError(
                f"max_completion_length={trainer.args.max_completion_length} leaves no room for a prompt: {role} has "
                f"positions for {limit} tokens"
            )
    for role, model in roles.items():
        if not _moved_by_padding(model, vocab_size, trainer):
            continue
        handles = _count_positions(model)
        if _moved_by_padding(model, vocab_size, trainer):
            for handle in handles:
                handle.remove()
            how = "position_ids do not help" if handles else "it takes no position_ids"
            raise InputError(
                f"{role} cannot be used: {type(trainer.accelerator.unwrap_model(model)).__name__} reads a prompt "
                f"otherwise with padding in front, and {how}; prompts of different length would be scored wrongly"
            )
    reference = getattr(trainer, "ref_model", None)  # the student as it was; an earlier trainer may have hooked it
    if reference is not None and _counts(trainer.model) and not _counts(reference):
        _count_positions(reference)
    return limits


def check_lengths(limits: dict[str, int], attention: Tensor) -> None:
    """Raises InputError for a row of the mask [B, P + T] with more real tokens than a model has positions for."""
    if not limits:
        return
    longest = int(attention.sum(1).max())
    for role, limit in limits.items():
        if longest > limit:
            raise InputError(
                f"a prompt and its completion have {longest} tokens, but {role} has positions for {limit} alone"
            )


# ------------------------------------------------------------------------------------- what a model does


def _moved_by_padding(model: Any, vocab_size: int, trainer: Any) -> bool:
    """Whether padding changes what the head is to read at the real tokens, for any process: one may have no weights yet
    (accelerate loads some models on the first alone)."""
    # Rotations are made in float32 whatever the model's dtype, and roundings add up through the layers: half of the
    # digits. Measured on random models of 45 families: up to 7e-7 in float32 and .02 in bfloat16 where positions are
    # relative, .2 to 1.5 where they are absolute.
    floats = [torch.float32, *(p.dtype for p in model.parameters() if p.dtype in checks.LOGIT_DTYPES)]
    allowed = math.sqrt(max(torch.finfo(dtype).eps for dtype in floats))
    moved = _change(model, vocab_size, trainer._tokenizer.pad_token_id or 0) > allowed
    everyones = trainer.accelerator.gather(torch.tensor([float(moved)], device=trainer.accelerator.device))
    return bool(everyones.any())


@torch.no_grad()
def _change(model: Any, vocab_size: int, pad: int) -> float:
    """By how much padding changes hidden states, relative to how they differ from token to token.

    The median over tokens: a rounding may send a single one to another expert. 0 where there are no numbers to compare.
    """
    room = _table_of_positions(model) or PADDING + TOKENS
    count = min(TOKENS, room // 2)
    padding = min(PADDING, room - count)
    ids = torch.arange(1, count + 1, device=next(model.parameters()).device) * 7919 % vocab_size
    ids = torch.where(ids == pad, (ids + 1) % vocab_size, ids)[None]  # some models find padding by its token
    real = torch.ones_like(ids)
    longer, mask = (nn.functional.pad(row, (padding, 0), value=value) for row, value in ((ids, pad), (real, 0)))
    with evaluating(model):
        both = cf.last_hidden_state(model, ids, real), cf.last_hidden_state(model, longer, mask)
    # An adapter may have put tokens of its own in front. Not every device has float64.
    alone, padded = (hidden[:, -count:].cpu().double() for hidden in both)
    if not alone.isfinite().all():
        return 0.0
    size = (alone - alone.mean(1, keepdim=True)).norm(dim=-1)
    off = (padded - alone).norm(dim=-1)
    return float(torch.where(off == 0, 0.0, off / size).nan_to_num(math.inf).median())


def _table_of_positions(model: Any) -> int | None:
    """How many positions a model has embeddings for; None if it has no such table."""
    config = getattr(model, "config", None)
    number = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    if not isinstance(number, int):
        return None
    tokens = model.get_input_embeddings()
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return number if any(number <= row <= number + 2 for row in rows) else None  # OPT's and BioGPT's have two more


# ------------------------------------------------------------------------------------- the positions


def _count_positions(model: nn.Module) -> list[RemovableHandle]:
    """Hooks on the modules that take position_ids. On all: TRL calls the layers below the head by themselves, and PEFT
    has called forward() past the hooks of the model it wraps."""
    takes = {"input_ids", "attention_mask", "position_ids"}
    return [
        module.register_forward_pre_hook(_with_positions, with_kwargs=True)
        for module in model.modules()
        if callable(getattr(module, "get_input_embeddings", None))
        and takes <= inspect.signature(type(module).forward).parameters.keys()
    ]


def _counts(model: nn.Module) -> bool:
    """Whether it has these hooks, of this trainer's or of another's that it was given to."""
    return any(hook is _with_positions for module in model.modules() for hook in module._forward_pre_hooks.values())


def _with_positions(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """The inputs with position_ids, where there are none: tokens before this one in the mask, which may have more
    columns than the input, those of a cache. A function of this module, so that a model with it can be pickled."""
    mask, given = inputs.get("attention_mask"), args[0] if args else inputs.get("input_ids")
    if given is None:
        given = inputs.get("inputs_embeds")
    if inputs.get("position_ids") is not None or not isinstance(mask, Tensor) or not isinstance(given, Tensor):
        return None
    if mask.dim() != 2 or mask.shape[1] < given.shape[1]:
        return None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
    return args, {**inputs, "position_ids": positions}
