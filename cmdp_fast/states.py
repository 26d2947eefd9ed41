"""The algebra of token states in float64 PyTorch: raise, merge, finish. The same as that of csrc/token_state.h.

A state is a row of 13 numbers, in the order of `FIELDS`: the references m, n; the sums z, u, a, b, h, k relative to
them; the token's two logits; two flags; and whether some tile needed double precision. Every backend folds tiles of
logits into such rows; what happens to rows afterwards is small and stands here once, for all devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast.reference import TokenStats

FIELDS = ("m", "n", "z", "u", "a", "b", "h", "k", "xa", "ya", "r_inf", "f_inf", "exact")
# Three runs of fields, each merged in its own way: by maximum, by addition once both are relative to the same
# references, and by maximum again.
REFERENCES, SUMS, LATEST = slice(0, 2), slice(2, 8), slice(8, 13)
_LOWEST = ("m", "n", "xa", "ya")  # begin at -inf; everything else at 0


def empty(rows: int, device: torch.device | str | None = None) -> Tensor:
    """The states of no columns, ``[rows, 13]``: the identity of `merged`."""
    fields = torch.zeros(rows, len(FIELDS), dtype=torch.float64, device=device)
    for name in _LOWEST:
        fields[:, FIELDS.index(name)] = -torch.inf
    return fields


def merged(mine: Tensor, theirs: Tensor) -> Tensor:
    """The states of two sets of columns of the same tokens, as one."""
    top = torch.maximum(mine, theirs)
    total = raised(mine, top) + raised(theirs, top)
    return torch.cat((top[:, REFERENCES], total[:, SUMS], top[:, LATEST]), dim=1)


def raised(fields: Tensor, top: Tensor) -> Tensor:
    """The states after their references have been moved up to those of ``top``."""
    m, n, z, u, a, b, h, k, *rest = fields.unbind(-1)
    # A side of no columns has nothing to scale.
    rise_x = torch.where(m == -torch.inf, 0.0, top[:, 0] - m)
    rise_y = torch.where(n == -torch.inf, 0.0, top[:, 1] - n)
    scale_x, scale_y, apart = (-rise_x).exp(), (-rise_y).exp(), rise_x - rise_y
    z, u = z * scale_x, u * scale_y
    # A rise may be infinite, if references are as far apart as floats can be; what weighs nothing adds nothing then.
    moved = (
        z,
        u,
        (a * scale_x - apart * z).where(z != 0, 0.0),
        (b * scale_y + apart * u).where(u != 0, 0.0),
        (h * scale_x - rise_x * z).where(z != 0, 0.0),
        (k * scale_y - rise_y * u).where(u != 0, 0.0),
    )
    return torch.stack((m, n, *moved, *rest), dim=-1)


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
    """What the backward pass needs of each row, ``[rows, SAVED]`` (SavedRow in csrc/); stats in float64."""
    m, n, z, u, *_, exact = fields.unbind(-1)
    normalizers = (torch.where(_usable(z, u), v, torch.nan) for v in (m, n, z.log(), u.log()))
    return torch.stack((*normalizers, stats.entropy, stats.reverse_kl, exact), dim=-1)


def _usable(z: Tensor, u: Tensor) -> Tensor:
    return (z > 0) & (z < torch.inf) & (u > 0) & (u < torch.inf)
