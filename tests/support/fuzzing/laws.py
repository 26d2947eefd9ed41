"""What is true of every operation's results, whatever it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from helpers import assert_no_worse, poisoned_memory
from torch import Tensor

from fuzzing.case import Case, Outcome, Tensors, evaluate
from fuzzing.layouts import Placed, copied

OF_ACCOUNTS = ("cumulative", "remaining", "violated", "first_violation", "excess")  # that a masked token reports


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Truth:
    """What a case should give, in float64 and of eager PyTorch; the same for every backend."""

    def __init__(self, case: Case) -> None:
        self.exact = self.eager = None
        if case.truth is not None:
            plain = plain_tensors(case.given)
            self.exact = evaluate(case, _cast(case, plain, torch.float64), call=case.truth)
            self.eager = evaluate(case, _cast(case, plain, case.computed), call=case.truth)


def _cast(case: Case, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if name in case.widened else t for name, t in tensors.items()}


def plain_tensors(given: dict[str, Placed]) -> Tensors:
    """Copies without a layout, in memory of their own."""
    return {name: placed.view().clone(memory_format=torch.contiguous_format) for name, placed in given.items()}


def hold(case: Case, backend: str, truth: Truth) -> None:
    """Runs a case on a backend; raises AssertionError for a law that does not hold."""
    given = copied(case.given)
    with poisoned_memory(), threads(case.threads[0]):
        outcome = evaluate(case, {name: placed.view() for name, placed in given.items()}, backend)
    _memory_is_as_it_was(case, given)
    _forms_are_right(case, outcome, given)
    errors_are_no_worse(case, outcome, truth)
    with poisoned_memory(), threads(case.threads[1]):
        if case.garbage is not None and case.mask is not None:
            _masked_rows_have_no_say(case, outcome, backend)
        if backend != "torch" and not case.layout_matters:
            _same_bits(outcome, evaluate(case, plain_tensors(case.given), backend), "contiguous copies")
        if backend != "torch" and case.by_row:
            _rows_stand_alone(case, outcome, backend)
        if case.also is not None:
            case.also(plain_tensors(case.given), outcome.outputs, backend)


def _memory_is_as_it_was(case: Case, given: dict[str, Placed]) -> None:
    overwritten = None if case.overwrites is None else given[case.overwrites].memory
    for name, placed in given.items():
        around = name == case.overwrites
        if placed.memory is overwritten and not around:
            continue
        before, after = case.given[name].bits(around), placed.bits(around)
        assert torch.equal(before, after), f"{name} was changed" + (" around what is shown of it" if around else "")


def _forms_are_right(case: Case, outcome: Outcome, given: dict[str, Placed]) -> None:
    used = {placed.memory.untyped_storage().data_ptr() for placed in given.values() if len(placed.memory)}
    for name, value in outcome.outputs.items():
        assert not value.numel() or value.untyped_storage().data_ptr() not in used, (
            f"{name} shares memory with an input"
        )
        if value.dtype not in (torch.bool, torch.int64):
            assert value.dtype == case.computed, f"{name} is {value.dtype}, expected {case.computed}"
        if case.kinds is not None and name not in case.free_shapes:
            assert tuple(value.shape) == case.rows, f"{name} has shape {list(value.shape)}, expected {list(case.rows)}"
    for name, value in outcome.gradients.items():
        like = given[name]
        assert value.dtype == like.memory.dtype, f"the gradient of {name} is {value.dtype}"
        assert tuple(value.shape) == like.shape, f"the gradient of {name} has shape {list(value.shape)}"
        if name != case.overwrites and value.numel():
            assert value.untyped_storage().data_ptr() not in used, f"the gradient of {name} shares memory with an input"


def errors_are_no_worse(case: Case, outcome: Outcome, truth: Truth) -> None:
    exact, eager = truth.exact, truth.eager
    if exact is None or eager is None:
        return
    of_values = case.value_sizes(exact.outputs) if case.value_sizes is not None else {}
    for name in exact.outputs:
        value = outcome.outputs[name]
        near, right = eager.outputs[name], exact.outputs[name]
        assert value.shape == right.shape, f"{name} has shape {list(value.shape)}, expected {list(right.shape)}"
        for kind, rows in _by_kind(case, value):
            size = float(of_values[name][rows].max()) if name in of_values and value.numel() else 1.0
            if case.precision is not None and value.is_floating_point():
                value, near, right = (t.to(case.precision) for t in (value, near, right))
            _compare(value[rows], near[rows], right[rows], f"{name} of rows '{kind}'", size, case.terms)
    sizes = case.sizes(exact.outputs) if case.sizes is not None else {}
    for name, value in outcome.gradients.items():
        near, right = eager.gradients[name].to(value.dtype), exact.gradients[name]
        if case.nan_gradient_is_free:
            lost = _without_meaning(case, name)
            free = (right.isnan().any(-1) | _beyond_numbers(outcome, exact))[..., None] & ~lost
            value, near, right = (t.masked_fill(free, 0.0) for t in (value, near, right))
            within = torch.arange(right.shape[-1]) < case.settings.get("vocab_size", right.shape[-1])
            near, right = (t.masked_fill(lost & within, torch.nan) for t in (near, right))
        size = sizes.get(name)
        for kind, rows in _by_kind(case, value):
            of_rows = 1.0 if size is None or not size.numel() else float((size[rows] if size.dim() else size).max())
            what = f"gradient of {name} in rows '{kind}'"
            _compare(value[rows], near[rows], right[rows], what, of_rows, case.terms)


def _by_kind(case: Case, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Which rows are of one kind; all together where an output does not have a row each."""
    if case.kinds is None or tuple(value.shape[: len(case.rows)]) != case.rows:
        yield "all", torch.ones((), dtype=torch.bool)
        return
    for kind in dict.fromkeys(case.kinds):
        yield kind, torch.tensor([k == kind for k in case.kinds]).reshape(case.rows)


def _compare(value: Tensor, near: Tensor, right: Tensor, what: str, size: float, terms: int) -> None:
    """The error criterion where numbers are finite. Elsewhere the same infinity and NaN, or what eager has."""
    if value.dtype in (torch.bool, torch.int64):
        assert torch.equal(value, right.to(value.dtype)), f"{what}: {value.tolist()}, expected {right.tolist()}"
        return
    most = torch.finfo(value.dtype).max
    expected = torch.where(right.isfinite() & (right.abs() > most), right.sign() * torch.inf, right)
    wrong = value.isnan() != expected.isnan()
    wrong |= value.isinf() != expected.isinf()
    wrong |= value.isinf() & expected.isinf() & (value.sign() != expected.sign().to(value.dtype))
    wrong &= ~_alike(value, near)
    # Sums are divided at the end: their terms may go beyond the largest number where the quotient is below it.
    wrong &= ~(value.isinf() & (right.abs() * terms > most))
    # The largest numbers of a dtype may round to infinity, and the smallest infinity back.
    wrong &= ~((right.abs() > 0.99 * most) & right.isfinite() & (value.abs() > 0.99 * most))
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        got, eager, exact = (float(t[where]) for t in (value, near, right))
        raise AssertionError(f"{what}: {got} at {list(where)}, eager {eager}, exact {exact}")
    finite = value.isfinite() & near.isfinite() & expected.isfinite()
    assert_no_worse(value[finite], near[finite], right[finite], what, size=max(size, 1.0), terms=terms)


def _beyond_numbers(outcome: Outcome, exact: Outcome) -> Tensor:
    """Rows with an infinity in place of a number that is nearly one."""
    pairs = [(outcome.outputs[name], right) for name, right in exact.outputs.items()]
    return torch.stack([value.isinf() & right.isfinite() for value, right in pairs]).any(0)


def _without_meaning(case: Case, name: str) -> Tensor:
    """Rows of logits with NaN or +inf, or -inf throughout, with a gradient that arrives."""
    x = case.given[name].view()[..., : case.settings.get("vocab_size")]
    bad = (x.isnan() | x.isposinf()).any(-1) | x.isneginf().all(-1)
    flowing = case.upstream
    if "topk_ids" in case.given:  # of nothing that is listed both divergences are 0, of what is excluded infinite
        flowing = {name: g for name, g in flowing.items() if not name.endswith("_kl")}
    arrives = torch.stack([torch.zeros(case.rows), *flowing.values()]).ne(0).any(0)
    counts = case.given[case.mask].view() if case.mask is not None else torch.tensor(True)
    return (bad & arrives & counts)[..., None]


def _alike(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _same_bits(outcome: Outcome, again: Outcome, what: str, row: int | None = None) -> None:
    for name, value in outcome.everything().items():
        other = again.everything()[name]
        assert value.shape == other.shape, f"{what}: {name} has shape {list(other.shape)}"
        same = _alike(value, other)
        assert same.all(), (
            f"{name} differs for {what}: {value[~same][0].item()!r} and {other[~same][0].item()!r}, "
            f"{int((~same).sum())} of {same.numel()} numbers"
        )


def _masked_rows_have_no_say(case: Case, outcome: Outcome, backend: str) -> None:
    assert case.garbage is not None and case.mask is not None
    plain = plain_tensors(case.given)
    away = ~plain[case.mask]
    if case.kinds is not None:
        for name, value in outcome.everything().items():
            if name in OF_ACCOUNTS or name.endswith(("_weight", "_bias")):
                continue
            if value.shape[: away.dim()] == away.shape:
                assert not value[away].any(), f"{name} is not 0 where the mask is False"
    again = case.layout_matters or backend == "torch"  # with as many threads, on which PyTorch's sums hang
    like = evaluate(case, plain, backend) if again else outcome
    _same_bits(like, evaluate(case, case.garbage(plain), backend), "nonsense in masked rows")


def _rows_stand_alone(case: Case, outcome: Outcome, backend: str) -> None:
    count = int(torch.Size(case.rows).numel())
    if not case.rows or count == 0:
        return
    row = case.threads[1] * 7919 % count  # any: the thread's number is drawn
    plain = plain_tensors(case.given)
    for name in case.by_row:
        plain[name] = plain[name].reshape(count, *plain[name].shape[len(case.rows) :])[row : row + 1]
    upstream = {name: g.reshape(count)[row : row + 1] for name, g in case.upstream.items()}
    alone = evaluate(case, plain, backend, upstream)
    part = Outcome(
        {name: value.reshape(count)[row : row + 1] for name, value in outcome.outputs.items()},
        {name: g.reshape(count, g.shape[-1])[row : row + 1] for name, g in outcome.gradients.items()},
    )
    _same_bits(part, alone, f"row {row} alone")
