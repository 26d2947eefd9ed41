"""Checks of arguments, made before any work is done: what is wrong, what was given, what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmdp_fast import storage

_WITH_MEMORY = (Tensor, torch.nn.Parameter)  # a subclass may be a description, such as a FakeTensor
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(t: object) -> str:
    if isinstance(t, Tensor):
        return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"
    return f"{type(t).__name__} {t!r}"


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if value.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor; convert it with torch.nested.to_padded_tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got one of layout {value.layout}; convert it with to_dense()")
    if type(value) in _WITH_MEMORY and not torch.compiler.is_compiling():
        try:
            lost = storage.lost(value)
        except NotImplementedError:  # in a transform of torch.func, which shows no memory
            return value
        if lost:
            raise ValueError(f"{name} of shape {list(value.shape)} {storage.LOST}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")


def logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """Checks a pair of logits ``[..., V]`` and returns the number of columns that count."""
    for name, value in (("student_logits", student), ("teacher_logits", teacher)):
        tensor(name, value)
        if value.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(value)}")
        if value.dim() < 1:
            raise ValueError(f"{name} must have shape [..., V], got {describe(value)}")
    same_device("teacher_logits", teacher, "student_logits", student)
    shapes = student.shape, teacher.shape
    if shapes[0] != shapes[1] and shapes[0][:-1] != shapes[1][:-1]:
        raise ValueError(
            "student_logits and teacher_logits must agree in all but the last axis, got "
            f"{list(student.shape)} and {list(teacher.shape)}"
        )
    widths = (shapes[0][-1], shapes[1][-1])
    if vocab_size is None:
        if widths[0] != widths[1]:
            raise ValueError(
                f"student_logits are {widths[0]} wide and teacher_logits {widths[1]}; "
                "pass vocab_size= to compare them over a common prefix"
            )
        vocab_size = widths[0]
    prefix(vocab_size, *widths)
    return vocab_size


def prefix(vocab_size: int, student_width: int, teacher_width: int) -> None:
    """Checks a number of columns that both models must have."""
    integer("vocab_size", vocab_size)
    widths = (student_width, teacher_width)
    if vocab_size < 1 or vocab_size > min(widths):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least 1 and at most the narrower width, "
            f"min({widths[0]}, {widths[1]}) = {min(widths)}"
        )


def tokens(value: Tensor, student: Tensor, name: str = "student_logits") -> None:
    """``student``: the logits or hidden states ``[..., *]``, called ``name``."""
    tensor("tokens", value)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"tokens must be int64, int32, int16 or uint8, got {describe(value)}")
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"tokens must have the shape of {name} without its last axis, {list(student.shape[:-1])}, "
            f"got {list(value.shape)}"
        )
    same_device("tokens", value, name, student)


def mask(value: Tensor | None, like: Tensor, shape: torch.Size, expected: str) -> None:
    if value is None:
        return
    tensor("mask", value)
    if value.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = counts), got {describe(value)}; convert with mask.bool()")
    if value.shape != shape:
        raise ValueError(f"mask must have the shape of {expected}, {list(shape)}, got {list(value.shape)}")
    same_device("mask", value, expected, like)


def token_range(value: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Raises on the first unmasked token outside ``[0, vocab)``. Looks at values: only for CPU tensors."""
    if value.numel() == 0:
        return
    lowest, highest = value.aminmax()
    if lowest >= 0 and highest < vocab:  # as a rule: the rest costs five times as much
        return
    value = value.long()  # a narrow type could not hold the bound it is compared with
    wrong = (value < 0) | (value >= vocab)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"tokens{list(where)} = {int(value[where])} is outside the vocabulary [0, {vocab}); "
            "mask tokens that do not count (mask=)"
        )


def positive(name: str, value: float) -> None:
    number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def discount(value: float) -> None:
    number("gamma", value)
    if not 0 < value <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {value}")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if type(value) is int and not torch.compiler.is_compiling():  # which knows no bounds
        try:
            float(value)
        except OverflowError:
            bits = value.bit_length()
            raise ValueError(f"{name} must fit a floating-point number, got an int of {bits} bits") from None


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")


def machine_integer(name: str, value: object) -> None:
    """As `integer`, of one that is more than counted with: it goes to a kernel, or to PyTorch."""
    integer(name, value)
    if type(value) is int and not torch.compiler.is_compiling() and value.bit_length() > 63:
        raise ValueError(f"{name} must fit 64 bits, got an int of {value.bit_length() + 1} bits")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(allowed)}")


def share(name: str, value: object) -> None:
    number(name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
