"""The mergeable state of a batch of tokens: statistics of logits that arrive in pieces.

For a teacher that streams its logits, a vocabulary held in tiles or on several ranks: fold what is there into a state,
in any order, merge states, and finish once everything has been seen. The algebra is that of csrc/token_state.h.
`linear_token_stats` is a loop over `fold_tile`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.layout import address
from cmdp_fast.ops import backends
from cmdp_fast.ops.native import matrix, threads, unit_stride
from cmdp_fast.reference import TokenStats, compute_dtype

FIELDS = ("m", "n", "z", "u", "a", "b", "h", "k", "xa", "ya", "r_inf", "f_inf", "exact")
_REFERENCES = ("m", "n", "xa", "ya")  # merged by maximum; the flags too; the sums are added


class TokenState:
    """Partial statistics of ``rows`` tokens over the columns seen so far. Not differentiable.

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
    far from all others). Columns that never come count as -inf for both models; a token whose column never came has
    log-probabilities of -inf.
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
        if rows < 0:
            raise ValueError(f"rows must be at least 0, got {rows}")
        checks.positive("temperature", temperature)
        fields = torch.zeros(rows, len(FIELDS), dtype=torch.float64, device=device)
        for name in _REFERENCES:
            fields[:, FIELDS.index(name)] = -torch.inf
        return cls(fields, float(temperature), torch.float32)

    def update(
        self,
        student_tile: Tensor,
        teacher_tile: Tensor,
        tokens: Tensor,
        *,
        first_column: int = 0,
        backend: str | None = None,
    ) -> TokenState:
        """Folds in columns [first_column, first_column + C) of every row, and returns the state itself.

        Args:
            student_tile, teacher_tile: ``[rows, C]`` logits, each of its own dtype. No column may be given twice.
            tokens: ``[rows]`` integers, indices into the whole vocabulary.
            first_column: where the tile begins in the vocabulary.
            backend: as `token_stats`.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit.
        """
        rows = self.fields.shape[0]
        checks.tensor("student_tile", student_tile)
        if student_tile.dim() != 2 or student_tile.shape[0] != rows:
            raise ValueError(f"student_tile must have shape [{rows}, C], got {list(student_tile.shape)}")
        if student_tile.shape[1] == 0:
            return self
        width = checks.logits(student_tile, teacher_tile, None)
        checks.tokens(tokens, student_tile)
        if first_column < 0:
            raise ValueError(f"first_column must be at least 0, got {first_column}")
        checks.same_device("student_tile", student_tile, "the state", self.fields)
        wide = compute_dtype(student_tile, teacher_tile)
        self.dtype = torch.float64 if wide == torch.float64 else self.dtype
        student, teacher = unit_stride(student_tile.detach()), unit_stride(teacher_tile.detach())
        chosen = backends.choose_for_logits(backend, student, wide, "token_state")
        if chosen == "torch":
            tile = _fold(student, teacher, tokens.long() - first_column, width, self.temperature)
            self.fields = _merged(self.fields, tile)
        else:
            _update_states(self.fields, student, teacher, tokens, first_column, self.temperature, chosen)
        return self

    def merge(self, other: TokenState) -> TokenState:
        """Folds in the state of other columns of the same tokens, and returns the state itself.

        Associative and commutative up to rounding. Raises ValueError if the states do not belong together.
        """
        if other.fields.shape != self.fields.shape or other.temperature != self.temperature:
            raise ValueError(
                f"cannot merge a state of {other.fields.shape[0]} rows at temperature {other.temperature} into one of "
                f"{self.fields.shape[0]} rows at temperature {self.temperature}"
            )
        self.fields = _merged(self.fields, other.fields)
        self.dtype = torch.float64 if torch.float64 in (self.dtype, other.dtype) else torch.float32
        return self

    def finish(self, process_group: dist.ProcessGroup | None = None) -> TokenStats:
        """The six statistics, ``[rows]`` float32 (float64 once any tile was float64), as `token_stats` returns them.

        Args:
            process_group: ranks that have each folded in their own columns of the same tokens. Their states are
                reduced first, in two all-reduces of ``[rows, 13]`` numbers together; every rank gets the statistics
                of all columns, and this state becomes that of all columns.
        """
        if process_group is not None:
            self.fields = all_reduced(self.fields, process_group)
        return TokenStats(*(value.to(self.dtype) for value in statistics(self.fields)))


def fold_tile(
    fields: Tensor,
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    first_column: int,
    temperature: float,
    backend: str,
    mask: Tensor | None = None,
) -> None:
    """`TokenState.update` of ``fields [rows, 13]`` in place, without checks.

    Logits may have several leading axes; tokens and mask are contiguous ``[rows]``, int64 and bool. A row that the mask
    excludes is not read, and its state stays as it is.
    """
    if backend == "cpu":
        backends.native.update_states(
            matrix(student),
            matrix(teacher),
            address(tokens),
            first_column,
            temperature,
            address(fields),
            threads(),
            address(mask),
        )
        return
    if backend == "triton":
        backends.kernels.update_states(fields, student, teacher, tokens, mask, first_column, temperature)
        return
    x, y = (t.reshape(len(fields), t.shape[-1]) for t in (student, teacher))
    kept = slice(None) if mask is None else mask
    tile = _fold(x[kept], y[kept], tokens[kept] - first_column, x.shape[1], temperature)
    fields[kept] = _merged(fields[kept], tile)


def all_reduced(fields: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """The state of all ranks' columns: one all-reduce of the maxima, one of the sums raised to them."""
    maxima = torch.cat((fields[:, :2], fields[:, 8:]), dim=1)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=process_group)
    sums = _raised(fields, maxima[:, :2])[:, 2:8].contiguous()
    dist.all_reduce(sums, group=process_group)
    return torch.cat((maxima[:, :2], sums, maxima[:, 2:]), dim=1)


def statistics(fields: Tensor) -> TokenStats:
    """The six statistics of finished states, in float64."""
    m, n, z, u, a, b, h, k, xa, ya, r_inf, f_inf, _ = fields.unbind(-1)
    log_z, log_u = z.log(), u.log()
    reverse = torch.where(r_inf > 0, torch.inf, (a / z - log_z + log_u).clamp(min=0))
    forward = torch.where(f_inf > 0, torch.inf, (b / u - log_u + log_z).clamp(min=0))
    entropy, teacher_entropy = (log_z - h / z).clamp(min=0), (log_u - k / u).clamp(min=0)
    logprob, teacher_logprob = ((xa - m) - log_z).clamp(max=0), ((ya - n) - log_u).clamp(max=0)
    values = (logprob, teacher_logprob, entropy, teacher_entropy, reverse, forward)
    return TokenStats(*(torch.where(_usable(z, u), v, torch.nan) for v in values))


def saved_scalars(fields: Tensor, stats: TokenStats) -> Tensor:
    """What the backward pass needs of each row, ``[rows, SAVED]`` (kSaved in csrc/cpu/kernels.h); stats in float64."""
    m, n, z, u, *_, exact = fields.unbind(-1)
    normalizers = (torch.where(_usable(z, u), v, torch.nan) for v in (m, n, z.log(), u.log()))
    return torch.stack((*normalizers, stats.entropy, stats.reverse_kl, exact), dim=-1)


def _usable(z: Tensor, u: Tensor) -> Tensor:
    return (z > 0) & (z < torch.inf) & (u > 0) & (u < torch.inf)


def _merged(mine: Tensor, theirs: Tensor) -> Tensor:
    """The fields of two states of disjoint columns, merged."""
    top = torch.maximum(mine, theirs)
    total = _raised(mine, top) + _raised(theirs, top)
    return torch.cat((top[:, :2], total[:, 2:8], top[:, 8:]), dim=1)


def _fold(student: Tensor, teacher: Tensor, column: Tensor, width: int, temperature: float) -> Tensor:
    """The fields of one tile in plain PyTorch; ``column`` is the token's, counted from the tile's first."""
    x, y = student.double() / temperature, teacher.double() / temperature
    has_x, has_y = ~torch.isneginf(x), ~torch.isneginf(y)
    m, n = x.amax(-1), y.amax(-1)
    m, n = torch.where(m.isneginf(), 0.0, m), torch.where(n.isneginf(), 0.0, n)
    t, s = x - m[:, None], y - n[:, None]
    p, w = t.exp(), s.exp()
    difference = (t - s).masked_fill(~(has_x & has_y), 0.0)
    z, u = p.sum(-1), w.sum(-1)
    own = (column >= 0) & (column < width)
    index = column.clamp(0, width - 1)[:, None]
    fields = (
        torch.where(z == 0, -torch.inf, m),
        torch.where(u == 0, -torch.inf, n),
        z,
        u,
        (p * difference).sum(-1),
        (w * -difference).sum(-1),
        (p * t.masked_fill(~has_x, 0.0)).sum(-1),
        (w * s.masked_fill(~has_y, 0.0)).sum(-1),
        torch.where(own, x.gather(1, index)[:, 0], -torch.inf),
        torch.where(own, y.gather(1, index)[:, 0], -torch.inf),
        (has_x & ~has_y).any(-1).double(),
        (has_y & ~has_x).any(-1).double(),
        torch.ones_like(z),
    )
    return torch.stack(fields, dim=-1)


def _raised(fields: Tensor, top: Tensor) -> Tensor:
    """The sums of a state after its references have been moved up to those of ``top``."""
    m, n, z, u, a, b, h, k, *rest = fields.unbind(-1)
    # A side without weight has nothing to scale: its reference may be -inf.
    rise_x = torch.where(z == 0, 0.0, top[:, 0] - m)
    rise_y = torch.where(u == 0, 0.0, top[:, 1] - n)
    scale_x, scale_y, apart = (-rise_x).exp(), (-rise_y).exp(), rise_x - rise_y
    moved = (
        z * scale_x,
        u * scale_y,
        (a - apart * z) * scale_x,
        (b + apart * u) * scale_y,
        (h - rise_x * z) * scale_x,
        (k - rise_y * u) * scale_y,
    )
    return torch.stack((m, n, *moved, *rest), dim=-1)


@torch.library.custom_op("cmdp_fast::update_states", mutates_args=("fields",))
def _update_states(
    fields: Tensor,
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    first_column: int,
    temperature: float,
    backend: str,
) -> None:
    index = tokens.to(torch.int64).contiguous()
    fold_tile(fields, student, teacher, index, first_column, temperature, backend)


@_update_states.register_fake
def _(fields, *args):
    return None
