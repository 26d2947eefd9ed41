"""The state of a row's tail: all columns of a student's logits but the few that a teacher has listed.

Of the columns v that are not listed, with x the logits divided by the temperature, a row of 4 numbers in the order of
`FIELDS`: a reference m, the sums z = sum e^(x-m) and h = sum e^(x-m) (x-m), and low = min x. It merges as the states of
`cmdp_fast.states` do: raising m by r multiplies z and h by e^-r, before which h loses r z. m need not be the maximum.

The tail is summed by itself. As a difference, all columns less those listed, a tail below 1e-7 of the whole, which a
language model that is sure of its next token has, would be rounding alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = ("m", "z", "h", "low")


class TailState(NamedTuple):
    """What a backend folds a tile of columns into, in place. float64 each."""

    fields: Tensor  # [rows, 4]: `FIELDS`
    listed: Tensor  # [rows, k] logits / temperature of the listed columns; -inf until one has passed, and if absent
    own: Tensor  # [rows] that of the token; -inf until its column has passed


class Tail(NamedTuple):
    """Rows of logits as all that follows needs them, in float64.

    The tail is relative to m, what is listed to t = max(m, the largest of it): of listed logits far above a tail
    x - m would keep nothing but the distance, where a student's mask has left -3.4e38 of all others.
    """

    reference: Tensor  # [...] m; NaN for a row that is no use, of which all that follows is 0, as that of a masked row
    height: Tensor  # [...] t - m
    listed: Tensor  # [..., k] x - t of the listed columns, -inf where absent
    own: Tensor  # [...] x - t of the token
    log_mass: Tensor  # [...] log sum e^(x-m) of the tail; -inf if it weighs nothing
    entropy: Tensor  # [...] of the distribution within the tail, in nats; 0 if it weighs nothing
    lowest: Tensor  # [...] min (x-m) of the tail; +inf if it has no column


def empty(rows: int, listed: int, device: torch.device) -> TailState:
    """The states of no columns."""
    fields = torch.zeros(rows, len(FIELDS), dtype=torch.float64, device=device)
    fields[:, 0], fields[:, 3] = -torch.inf, torch.inf
    return TailState(
        fields,
        torch.full((rows, listed), -torch.inf, dtype=torch.float64, device=device),
        torch.full((rows,), -torch.inf, dtype=torch.float64, device=device),
    )


def merged(mine: Tensor, theirs: Tensor) -> Tensor:
    """The fields of two sets of columns of the same rows, as those of one."""
    top = torch.maximum(mine[:, 0], theirs[:, 0])
    parts = []
    for m, z, h, _ in (mine.unbind(-1), theirs.unbind(-1)):
        rise = torch.where(z == 0, 0.0, top - m)  # without weight there is nothing to scale
        shrink = (-rise).exp()
        z = z * shrink
        parts.append(torch.stack([z, (h * shrink - rise * z).where(z != 0, 0.0)], -1))  # a rise may be infinite
    return torch.cat([top[:, None], parts[0] + parts[1], torch.minimum(mine[:, 3:], theirs[:, 3:])], -1)


def finished(state: TailState, mask: Tensor | None = None) -> Tail:
    """The state of all columns; m is the largest listed logit where the tail has no weight.

    ``mask [rows]``: False for rows that have not been read. No use is a row with a NaN or +inf, or of -inf throughout.
    """
    m, z, h, low = state.fields.unbind(-1)
    weightless = z == 0
    highest = torch.cat([state.listed, state.own[:, None]], -1).amax(-1)
    m = torch.where(weightless, highest, m)
    of_no_use = ~(z < torch.inf) | ~(highest < torch.inf) | ~m.isfinite()
    top = torch.maximum(m, highest)
    values = (
        top - m,
        state.listed - top[:, None],
        state.own - top,
        z.log(),
        torch.where(weightless, 0.0, z.log() - h / z).clamp(min=0),
        low - m,
    )
    absent = of_no_use if mask is None else of_no_use | ~mask
    kept = (t.masked_fill(absent.reshape(-1, *[1] * (t.dim() - 1)), 0.0) for t in values)
    m = m.masked_fill(of_no_use, torch.nan)
    return Tail(m if mask is None else m.masked_fill(~mask, 0.0), *kept)
