"""Rows of logits: usual ones, and those at which kernels break."""

import torch
from torch import Tensor

from fuzzing.draws import Draw

DTYPES = {torch.float32: 5, torch.bfloat16: 3, torch.float16: 2, torch.float64: 2}
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 513, 1000, 1025, 2049, 4097)
VERY_WIDE = (9011, 40_003, 120_001)
ROWS = ((), (1,), (2,), (3,), (7,), (12,), (2, 3), (3, 1), (1, 4), (2, 2, 3), (1, 2, 1, 2, 1, 3, 1, 1, 1), (0,), (2, 0))
ROWS_WEIGHTS = (1, 3, 4, 4, 4, 2, 4, 1, 1, 2, 1, 0.4, 0.4)
BASES = ("normal", "peaked", "ties", "flat", "of 1e4", "subnormal", "far off", "close models")
SPECIALS = (
    "none",
    "-inf in one",
    "-inf in both",
    "one column left",
    "lowest in some",
    "lowest throughout",
    "highest",
    "nan",
    "+inf",
    "-inf throughout",
)
SPECIALS_WEIGHTS = (8, 1, 1, 1, 1, 1, 1, 1, 1, 0.5)
TEMPERATURES = (1.0, 0.7, 1.3, 2.0, 0.05, 30.0, 1e-3, 1e3)
TEMPERATURES_WEIGHTS = (6, 3, 2, 2, 1, 1, 0.5, 0.5)


def drawn_rows(draw: Draw) -> tuple[int, ...]:
    return draw.choice("rows", ROWS, ROWS_WEIGHTS)


def drawn_width(draw: Draw, rows: int) -> int:
    if rows <= 2 and draw.chance("very wide", 0.04):
        return draw.choice("wide", VERY_WIDE)
    most = 20_000 // max(rows, 1)
    return draw.choice("width", [width for width in WIDTHS if width <= most])


def drawn_temperature(draw: Draw) -> float:
    return draw.choice("temperature", TEMPERATURES, TEMPERATURES_WEIGHTS)


def drawn_pair(
    draw: Draw, rows: tuple[int, ...], width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[list[Tensor], list[str]]:
    """Logits ``[*rows, width]`` of both models, and what is special about each row."""
    count = int(torch.Size(rows).numel())
    base = draw.choice("base", BASES)
    x, y = (_based(draw, base, count, width) for _ in range(2))
    if base == "close models":
        y = x + 1e-3 * y
    pair = [_in_range(t, dtype) for t, dtype in zip((x, y), dtypes, strict=True)]
    usual = draw.chance("only usual rows", 0.4)
    kinds = ["none" if usual else draw.choice("special", SPECIALS, SPECIALS_WEIGHTS) for _ in range(count)]
    for row, kind in enumerate(kinds):
        _spoil(draw, kind, [t[row] for t in pair])
    return [t.reshape(*rows, width) for t in pair], [f"{base}, {kind}" for kind in kinds]


def _based(draw: Draw, base: str, count: int, width: int) -> Tensor:
    noise = draw.normal(count, width)
    if base == "peaked":
        top = draw.integers(width, count, 1)
        height = 10.0 + 60.0 * draw.uniform(count, 1)
        return (2 * noise).scatter_add(-1, top, height)
    if base == "ties":
        return (noise * 1.5).round()
    if base == "flat":
        return torch.zeros_like(noise) + draw.normal(count, 1)
    if base == "of 1e4":
        return noise.sign() * 1e4
    if base == "subnormal":
        return noise * 1e-40
    if base == "far off":
        return noise * 3 + draw.choice("offset", (1e3, -1e3, 1e9, -1e20))
    return noise * 3


def _in_range(t: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return t.clamp(-most, most).to(dtype)


def _columns(draw: Draw, width: int) -> Tensor:
    """Some columns: often the first or the last, where loops begin and end."""
    place = draw.choice("special column", ("first", "last", "any", "many"))
    if place == "many":
        return draw.mostly(0.3, width).nonzero().flatten()
    return torch.tensor([{"first": 0, "last": width - 1, "any": draw.integer(0, width - 1)}[place]])


def _spoil(draw: Draw, kind: str, rows: list[Tensor]) -> None:
    """Writes what is special about a row of both models into it."""
    if kind == "none":
        return
    width, which = len(rows[0]), draw.choice("special in", ("student", "teacher", "both"))
    chosen = {"student": rows[:1], "teacher": rows[1:], "both": rows}[which]
    columns = _columns(draw, width)
    for row in rows if kind == "-inf in both" else chosen:
        finfo = torch.finfo(row.dtype)
        if kind.startswith("-inf in ") and len(columns) < width:
            row[columns] = -torch.inf
        elif kind == "one column left":
            kept = row[columns[:1]].clone()
            row.fill_(-torch.inf)
            row[columns[:1]] = kept
        elif kind == "lowest in some":
            row[columns] = finfo.min
        elif kind in ("lowest throughout", "-inf throughout"):
            row.fill_(finfo.min if kind.startswith("lowest") else -torch.inf)
        else:
            value = {"highest": finfo.max, "nan": torch.nan, "+inf": torch.inf}
            row[columns] = value.get(kind, -torch.inf)
