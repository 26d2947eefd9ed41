"""The teacher: loaded, or found where it is asked, and checked before the student is; then put where the student is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import cmdp_fast as cf
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.teachers.open import check_vocabulary, is_asked, open_teacher
from cmdp_fast.teachers.teacher import Asking, Teacher
from cmdp_fast.vocabulary import check_tokenizers, common_vocabulary


def load_teacher(teacher: Any, args: Any) -> Any:
    """A model given as such, or by its hub id or folder with `args.teacher_model_init_kwargs`; frozen. Or one that is
    asked: a `Teacher`, or its name with the fields of `Asking` in the place of those keywords.

    Raises InputError if there is none, or if it cannot be loaded or asked.
    """
    from trl.trainer.utils import create_model_from_path

    options = dict(args.teacher_model_init_kwargs or {})
    if teacher is None:
        raise InputError("teacher_model is missing: a hub id, a folder, or a model as the trainer's argument")
    if isinstance(teacher, str) and is_asked(teacher):
        return open_teacher(teacher, _asking(options))
    if isinstance(teacher, str):
        options = {"dtype": "auto", "trust_remote_code": args.trust_remote_code} | options
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # every process has its own
        try:
            teacher = create_model_from_path(teacher, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"teacher_model {teacher}: no causal language model there: {first_line(error)}") from error
    elif options:
        raise InputError("teacher_model_init_kwargs say how to load a teacher, but teacher_model is loaded already")
    if isinstance(teacher, Teacher):
        return teacher
    if not callable(getattr(teacher, "requires_grad_", None)):
        raise InputError(
            f"teacher_model must be a hub id, a folder, a model or a Teacher, got a {type(teacher).__name__}"
        )
    return teacher.eval().requires_grad_(False)


def _asking(options: dict[str, Any]) -> Asking:
    """Raises InputError for keywords that are none of those of a teacher that is asked, or of another type."""
    known = {each.name: each.default for each in fields(Asking)}
    for name, value in options.items():
        if name not in known:
            raise InputError(
                f"teacher_model_init_kwargs: there is no {name} for a teacher that is asked, only {', '.join(known)}"
            )
        kinds = (float, int) if isinstance(known[name], float) else (type(known[name]),)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"teacher_model_init_kwargs: {name} must be a {kinds[0].__name__}, got {value!r}")
    return Asking(**options)


def prepare_teacher(teacher: Any, trainer: Any) -> Any:
    """The teacher on the student's device, as TRL does it with a reference model; of one that is asked, its head."""
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    if isinstance(teacher, Teacher):
        return teacher.to(trainer.accelerator.device)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(teacher, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(teacher, trainer.accelerator)
    return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)


def check_pair(student: Any, teacher: Any, tokenizer: Any) -> int:
    """The width of the vocabulary that both models have; models of a family may pad it differently.

    Raises InputError if a head is not known (`cf.head_of`), or if the models do not share a tokenizer.
    """
    for role, model in (("the student", student), ("teacher_model", teacher)):
        try:
            if not isinstance(model, Teacher):
                cf.head_of(model)
            elif model.about.answers != "topk":
                model.own_head()
        except (TypeError, ValueError) as error:
            raise InputError(f"{role} cannot be used: {first_line(error)}") from error
    width = common_vocabulary(student, teacher)
    if len(tokenizer) > width:
        raise InputError(
            f"student and teacher must share a tokenizer, but the student's has {len(tokenizer)} tokens, and the "
            f"models' logits have only {width} columns in common"
        )
    if isinstance(teacher, Teacher):
        check_vocabulary(teacher, tokenizer)
    elif (theirs := _tokenizer_of(teacher)) is not None:
        check_tokenizers(tokenizer, theirs)
    return width


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the model's weights; None if there is none to compare with."""
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=False
        )  # without it transformers asks at a terminal
    except (OSError, ValueError):
        return None


def suppress_unshared_columns(trainer: Any, width: int) -> None:
    """Has the student never sample a token that the teacher has no column for. Such columns belong to no token of the
    tokenizer, but a model that was never trained on them may sample them.

    Raises InputError if vLLM samples, which has no such setting.
    """
    whole = trainer.model.get_output_embeddings().weight.shape[0]
    if whole <= width:
        return
    if trainer.use_vllm:
        raise InputError(
            f"the student's logits have {whole} columns and the teacher's {width}: with use_vllm the student could "
            "sample from the others; resize its embeddings, or leave use_vllm out"
        )
    unshared = list(range(width, whole))
    trainer.generation_config.suppress_tokens = [*(trainer.generation_config.suppress_tokens or []), *unshared]
    trainer.generation_kwargs["suppress_tokens"] = trainer.generation_config.suppress_tokens
