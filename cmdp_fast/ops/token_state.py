"""The mergeable state of a batch of tokens: statistics of logits that arrive in pieces.

For a teacher that streams its logits, a vocabulary held in tiles or on several ranks: fold what is there into a state,
in any order, merge states, and finish once everything has been seen. The algebra is that of csrc/token_state.h.
`linear_token_stats` is a loop of the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks, states
from cmdp_fast.layout import Pair, unit_stride
from cmdp_fast.ops import backends
from cmdp_fast.ops.onlookers import (
    any_tangent,
    forward_mode,
    forward_mode_in_graph,
    gradient_in_graph,
    transformed,
    transforms_of,
)
from cmdp_fast.ops.operator import operator
from cmdp_fast.ops.parallel import Alike, all_reduced, check_states
from cmdp_fast.reference import TokenStats, compute_dtype


class TokenState:
    """Partial statistics of ``rows`` tokens over the columns seen so far.

    It has no gradients: tiles are detached, and a derivative of torch.func or forward mode with respect to the
    student's is an error, as is a vmap of `update`, which writes to ``fields``.

    The tool for logits that never are in one place: a teacher that streams its logits, a vocabulary in tiles, columns
    on several ranks. Fold in what is there with `update`, in any order and in tiles of any widths; `merge` states that
    were made apart (on other threads, or other machines: ``fields`` is all there is to send); `finish` once every
    column has been seen exactly once. All three cost no more than reading the tiles, and nothing as wide as the
    vocabulary is kept.

    >>> state = TokenState.empty(rows=2)
    >>> for start in range(0, vocab, width):
    ...     tile = slice(start, start + width)
    ...     state.update(student[:, tile], teacher[:, tile], tokens, first_column=start)
    >>> stats = state.finish()  # as token_stats(student, teacher, tokens), up to rounding

    ``fields`` is ``[rows, 13]`` float64: the references m, n, the sums z, u, a, b, h, k, the token's two logits and
    two flags (csrc/token_state.h says what each one is), and whether some tile needed double precision (NaN, logits
    far from all others). `update` writes to them, so they must be contiguous there. Columns that never come count as
    -inf for both models; a token whose column never came has log-probabilities of -inf.
    """

    def __init__(self, fields: Tensor, temperature: float, dtype: torch.dtype):
        self.fields = fields
        self.temperature = temperature
        self.dtype = dtype

    @classmethod
    def empty(cls, rows: int, *, temperature: float = 1.0, device: torch.device | str | None = None) -> TokenState:
        """The state of no columns: the identity of `merge`.

        Args:
            rows: how many tokens.
            temperature: divides both models' logits.
            device: where ``fields`` is kept, that of the tiles to come.

        Raises:
            ValueError: rows < 0 or a temperature that is not positive.
        """
        checks.machine_integer("rows", rows)
        if rows < 0:
            raise ValueError(f"rows must be at least 0, got {rows}")
        checks.positive("temperature", temperature)
        return cls(states.empty(rows, device), float(temperature), torch.float32)

    def update(
        self,
        student_tile: Tensor,
        teacher_tile: Tensor,
        tokens: Tensor,
        *,
        first_column: int = 0,
        backend: backends.BackendName | None = None,
    ) -> TokenState:
        """Folds in columns [first_column, first_column + C) of every row, and returns the state itself.

        Args:
            student_tile, teacher_tile: ``[rows, C]`` logits, each of its own dtype. No column may be given twice.
                Kernels multiply logits by log2(e) / temperature in float32, which rounds it by 6e-8, but divide where
                one of both is float64, as plain PyTorch always does. So let one backend fold all tiles of a state, and
                let all of them be float64 or none: else it is off by up to 1.2e-7 max |logit| / temperature nats.
            tokens: ``[rows]`` integers, indices into the whole vocabulary.
            first_column: where the tile begins in the vocabulary.
            backend: as `token_stats`.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit, also those of ``fields``. The state stays
                as it was.
            NotImplementedError: in a derivative of torch.func or forward mode, or in a vmap.
        """
        checks.tensor("student_tile", student_tile)
        rows = _check_fields(self.fields)
        if torch.compiler.is_compiling() or transformed() or forward_mode():
            _check_transforms(student_tile, teacher_tile, tokens, self.fields)
        if not self.fields.is_contiguous():
            raise ValueError(
                f"fields must be contiguous, {[rows, len(states.FIELDS)]}, since update writes to them, got strides "
                f"{list(self.fields.stride())}; make a state of fields.contiguous()"
            )
        if student_tile.dim() != 2 or student_tile.shape[0] != rows:
            raise ValueError(f"student_tile must have shape [{rows}, C], got {list(student_tile.shape)}")
        if student_tile.shape[1] == 0:
            return self
        width = checks.logits(student_tile, teacher_tile, None)
        checks.tokens(tokens, student_tile)
        checks.integer("first_column", first_column)
        if first_column < 0:
            raise ValueError(f"first_column must be at least 0, got {first_column}")
        checks.machine_integer("first_column + C", first_column + width)
        checks.same_device("student_tile", student_tile, "the state", self.fields)
        wide = compute_dtype(student_tile, teacher_tile)
        student, teacher = unit_stride(student_tile.detach()), unit_stride(teacher_tile.detach())
        chosen = backends.choose_for_logits(backend, student, wide, "token_state")
        index = tokens.to(torch.int64).contiguous()
        pair = Pair(student, teacher, index, None, self.temperature, width)
        _update_states(_Given(pair, first_column, self.fields, chosen))
        self.dtype = torch.float64 if wide == torch.float64 else self.dtype
        return self

    def merge(self, other: TokenState) -> TokenState:
        """Folds in the state of other columns of the same tokens, and returns the state itself.

        Associative and commutative up to rounding. Raises ValueError if the states do not belong together, TypeError
        for fields that are not float64.
        """
        if not isinstance(other, TokenState):
            raise TypeError(f"other must be a TokenState, got {checks.describe(other)}")
        rows, others = _check_fields(self.fields), _check_fields(other.fields)
        if others != rows or other.temperature != self.temperature or other.fields.device != self.fields.device:
            raise ValueError(
                f"cannot merge a state of {others} rows at temperature {other.temperature} on {other.fields.device} "
                f"into one of {rows} rows at temperature {self.temperature} on {self.fields.device}"
            )
        self.fields = states.merged(self.fields, other.fields)
        self.dtype = torch.float64 if torch.float64 in (self.dtype, other.dtype) else torch.float32
        return self

    def finish(self, process_group: dist.ProcessGroup | None = None) -> TokenStats:
        """The six statistics, ``[rows]`` float32 (float64 once any tile was float64), as `token_stats` returns them.

        Args:
            process_group: ranks that have each folded in their own columns of the same tokens. A few numbers are
                exchanged and looked at first; then their states are reduced, in two all-reduces of ``[rows, 13]``
                numbers together. Every rank gets the statistics of all columns, and this state becomes that of all
                columns.

        Raises:
            TypeError, ValueError: fields that are not float64 ``[rows, 13]``; on every rank, where ranks differ in
                rows, temperature or dtype.
        """
        rows = _check_fields(self.fields)
        if process_group is not None:
            check_states(process_group, rows, Alike(self.temperature, self.dtype), self.fields.device)
            self.fields = all_reduced(self.fields, process_group)
        return TokenStats(*(value.to(self.dtype) for value in states.statistics(self.fields)))


def _check_fields(fields: Tensor) -> int:
    """Checks the fields of a state, which anyone may have made, and returns how many rows they are."""
    dense = isinstance(fields, Tensor) and not fields.is_nested and fields.layout is torch.strided
    if dense and fields.dtype == torch.float64 and fields.dim() == 2 and fields.shape[1] == len(states.FIELDS):
        return fields.shape[0]
    error = ValueError if checks.tensor("fields", fields).dtype == torch.float64 else TypeError
    raise error(f"fields must be float64 [rows, {len(states.FIELDS)}], got {checks.describe(fields)}")


def _check_transforms(student: Tensor, *others: Tensor) -> None:
    """Raises NotImplementedError for what would be a silent 0, or an error inside of torch."""
    if torch.compiler.is_compiling():  # which shows no wrappers
        wanted, batched = forward_mode_in_graph() or gradient_in_graph(), False
    else:
        of_student = transforms_of(student)
        wanted = any_tangent((student,)) or "jvp" in of_student or "grad" in of_student
        batched = "vmap" in of_student or any("vmap" in transforms_of(t) for t in others if isinstance(t, Tensor))
    if wanted:
        raise NotImplementedError(
            "cmdp_fast.TokenState has no derivative (torch.func, torch.autograd.forward_ad); use token_stats"
        )
    if batched:
        raise NotImplementedError(
            "cmdp_fast.TokenState.update has no torch.func.vmap: it writes to the state; give a batch as more rows"
        )


class _Given(NamedTuple):
    pair: Pair
    first_column: int
    fields: Tensor
    backend: str


@operator("update_states", mutates="fields")
def _update_states(given: _Given) -> None:
    backends.get(given.backend).update_states(given.pair, given.first_column, given.fields)


@_update_states.shapes
def _(given: _Given) -> None:
    return None
