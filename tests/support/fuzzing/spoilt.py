"""Cases with one argument that is wrong: an error that says so, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzing.case import Case, Tensors
from fuzzing.draws import Draw
from fuzzing.layouts import copied

EXPECTED = (TypeError, ValueError, RuntimeError)
Wrong = Callable[[Draw, Tensors, Any], Any]
NUMBERS = {
    "temperature": (0.0, -1.0, float("nan"), float("inf"), "1", None, True, torch.ones(())),
    "vocab_size": (0, -1, 10**9, 1.5, "5", True),
    "beta": (-0.1, 1.1, float("nan"), "x"),
    "kind": ("kl", "", 3, "JSD"),
    "top_k": (-1, 1.5, "2", True),
    "min_logprob": (0.5, float("nan"), "0"),
    "budget": (-1.0, float("nan"), "2", True),
    "gamma": (0.0, 1.5, float("nan"), -1.0, "1"),
    "reduction": ("max", 1),
    "edge": ("soft", 0),
    "per_token": (1, "yes"),
    "penalty": (-1.0, float("nan"), float("inf"), "1"),
    "penalty_at": ("never", 2),
    "discrepancy_weight": (-1.0, float("nan")),
    "barrier_slope": (-1.0, float("inf")),
    "cost": ("l2", 0),
    "saved": ("all", 1),
    "backend": ("cpus", "", 1),
}


def other_dtype(draw: Draw, tensors: Tensors, name: str) -> Tensor:
    t = tensors[name]
    options = (torch.complex64, torch.int8) if t.is_floating_point() else (torch.float32, torch.complex64)
    return t.to(draw.choice("wrong dtype", options))


def other_shape(draw: Draw, tensors: Tensors, name: str) -> Tensor:
    t = tensors[name]
    kind = draw.choice("wrong shape", ("an axis more", "an axis less", "longer"))
    if kind == "an axis less" and t.dim():
        return t[..., 0] if t.shape[-1] else t.sum(-1).to(t.dtype)
    if kind == "longer" and t.dim():
        return torch.cat([t, t[..., :1] if t.shape[-1] else t.new_zeros((*t.shape[:-1], 1))], -1)
    return t[None].expand(2, *t.shape)


def no_tensor(draw: Draw, tensors: Tensors, name: str) -> Any:
    return {"a list": [1, 2], "a number": 3, "text": "logits"}[
        draw.choice("in place of a tensor", ("a list", "a number", "text"))
    ]


def other_device(draw: Draw, tensors: Tensors, name: str) -> Tensor:
    return tensors[name].to("meta")


def outside(draw: Draw, tensors: Tensors, name: str) -> Tensor | None:
    """A token outside of the vocabulary where it counts, offsets that fall or end elsewhere, a negative budget."""
    t = tensors[name].clone(memory_format=torch.contiguous_format)
    if not t.numel() or name not in ("tokens", "cu_seqlens", "budget"):
        return None
    place = draw.integer(0, t.numel() - 1)
    if name == "tokens" and (t.dtype == torch.uint8 or ("mask" in tensors and not tensors["mask"].flatten()[place])):
        return None
    wrong = {"tokens": (-1, -(2**15)), "cu_seqlens": (-1, 10**6, -(2**31)), "budget": (-1.0, float("nan"))}[name]
    t.view(-1)[place] = draw.random.choice(wrong)
    return t


TENSORS: tuple[Wrong, ...] = (other_dtype, other_shape, no_tensor, other_device, outside)


def allowed(case: Case, wrong: Wrong, name: str, value: Any, backend: str) -> bool:
    """Whether it is no error after all."""
    if wrong is other_device:  # of one tensor alone, or of all that are looked at
        return backend == "torch" or len(case.given) == 1 or name == "first_violation"
    if wrong is other_shape:
        wider = isinstance(value, Tensor) and value.dim() == len(case.given[name].shape)
        alone = "teacher_logits" not in case.given
        prefix = name.endswith("_logits") and wider and (alone or "vocab_size" in case.settings)
        scalar = name == "budget" and value.dim() == 0
        empty = name == "cu_seqlens" and not any(case.given[name].view().tolist())
        lonely = name == "cost" and wider and set(case.given) <= {"cost", "budget"}
        return prefix or scalar or empty or lonely or name == "first_violation"
    if wrong is other_dtype:
        real = isinstance(value, Tensor) and not value.is_complex()
        return name == "first_violation" or (real and name in ("budget", "task_reward", *TRACED))
    nothing_spent = wrong is outside and name == "budget" and case.settings.get("per_token", False)
    number = name in ("budget", "min_logprob") and isinstance(value, (int, float))
    return name == "first_violation" or number or nothing_spent


TRACED = ("cumulative", "remaining", "excess")


def hold(case: Case, draw: Draw, backend: str) -> str:
    """Spoils one argument; raises AssertionError unless the call raises an error with a message and changes nothing.

    Returns what was done, empty where nothing could be wrong in the way that was drawn.
    """
    if case.public is None:
        return ""
    given = copied(case.given)
    tensors: dict[str, Any] = {name: placed.view() for name, placed in given.items()}
    numbers = [name for name in (*case.settings, "backend") if name in NUMBERS]
    changed: dict[str, Any] = {}
    if draw.chance("a wrong number", 0.4):
        name = draw.choice("wrong setting", numbers)
        changed[name] = draw.random.choice(NUMBERS[name])
        what = f"{name}={changed[name]!r}"
    else:
        name, wrong = draw.choice("wrong argument", tuple(tensors)), draw.choice("wrong in", TENSORS)
        value = wrong(draw, tensors, name)
        if value is None or allowed(case, wrong, name, value, backend):
            return ""
        tensors[name], what = value, f"{wrong.__name__.replace('_', ' ')}: {name}"
    try:
        case.public({**tensors}, {"backend": backend, **changed})
    except EXPECTED as error:
        assert len(str(error)) > 10, f"{what}: {type(error).__name__} says {str(error)!r}"
    else:
        raise AssertionError(f"{what} was accepted")
    for name, placed in given.items():
        assert torch.equal(placed.bits(), case.given[name].bits()), f"{what}: {name} was changed"
    return what
