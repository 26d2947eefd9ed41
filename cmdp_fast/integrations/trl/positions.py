"""Prompts with padding in front: models that would count their positions from the padding on count from the first real
token, as in `generate`.

TRL gives its models ids and a mask, and no positions. Most models need none: rotations and ALiBi know distances alone,
and some count by the mask. GPT-2 and others number the columns of a batch, so a short prompt beside a long one is read
with the wrong embeddings. Which a model does is measured, and positions are then given by a hook, so that TRL's own
calls, of the student and of a reference model, are right as well.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.heads import evaluating
from cmdp_fast.positions import moved_by_padding, table_of_positions
from cmdp_fast.teachers.teacher import Teacher


def settle_positions(trainer: Any, teacher: Any, vocab_size: int) -> dict[str, int]:
    """Sees to it that the trainer's student and the teacher read a prompt as they would without padding in front.

    A model that does so is left as it is. Where one does not, its modules that take position_ids get a hook that counts
    them, which stays on the model; the student's reference model gets the same. Runs both models on some tokens below
    ``vocab_size``, so every process must call it. Returns the number of positions of each model that has a table of
    them, by its role. A teacher that is asked gets no padding, and says how many it has.

    Raises InputError for a model that the positions do not help, such as RWKV, whose state the padding changes, and for
    a table without room for a prompt before ``max_completion_length`` tokens.
    """
    roles = {"the student": trainer.model, "teacher_model": teacher}
    limits = {role: limit for role, model in roles.items() if (limit := _most_positions(model)) is not None}
    for role, limit in limits.items():
        if trainer.args.max_completion_length >= limit:
            raise InputError(
                f"max_completion_length={trainer.args.max_completion_length} leaves no room for a prompt: {role} has "
                f"positions for {limit} tokens"
            )
    for role, model in roles.items():
        if isinstance(model, Teacher) or not _moved_by_padding(model, vocab_size, trainer):
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


def _most_positions(model: Any) -> int | None:
    return model.about.positions or None if isinstance(model, Teacher) else table_of_positions(model)


def _moved_by_padding(model: Any, vocab_size: int, trainer: Any) -> bool:
    """Whether padding changes what the head is to read at the real tokens, for any process: one may have no weights yet
    (accelerate loads some models on the first alone)."""
    with evaluating(model):
        moved = moved_by_padding(
            lambda ids, mask: cf.last_hidden_state(model, ids, mask),
            *(model, vocab_size, trainer._tokenizer.pad_token_id or 0),
        )
    everyones = trainer.accelerator.gather(torch.tensor([float(moved)], device=trainer.accelerator.device))
    return bool(everyones.any())


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
