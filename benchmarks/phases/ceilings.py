"""What the device can do: bytes per second of a copy, operations per second of products in every form that is used."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmdp_fast.bench.measure import elapsed
from cmdp_fast.ops import gemm, tile_size
from phases.record import Part
from phases.setting import Setting

REPEAT = 9


class Product(NamedTuple):
    """Sizes of a product, [rows, inner] x [inner, columns]."""

    name: str
    rows: int
    inner: int
    columns: int


PRODUCTS = (
    Product("8192 cubed", 8192, 8192, 8192),
    Product("Qwen2.5-1.5B's head", 8192, 1536, 32768),
    Product("Qwen2.5-7B's head", 8192, 3584, 32768),
    Product("gradient of a head", 32768, 8192, 1536),
)
SMALL = (Product("32 cubed", 32, 32, 32),)


def parts(setting: Setting) -> list[Part]:
    """The copy, then a part per product."""
    products = SMALL if setting.small else PRODUCTS
    return [
        Part("ceiling: copy", 10, lambda: _copy(setting)),
        *(Part(f"ceiling: product, {p.name}", 15, lambda p=p: _product(setting, p)) for p in products),
        Part("what the probe of products chose", 10, lambda: _chosen(setting)),
    ]


def _median(setting: Setting, function: Callable[[], object]) -> float:
    function()
    function()
    return statistics.median(elapsed(function, setting.device) for _ in range(REPEAT))


def _copy(setting: Setting) -> dict[str, Any]:
    """Bytes per second, read and written, of a copy and of an addition; of bytes read, of a sum."""
    size = 2**16 if setting.small else 2**29
    x, y = (torch.randn(size, device=setting.device) for _ in range(2))
    out = torch.empty_like(x)
    rates = {
        "copy": 2 * x.nbytes / _median(setting, lambda: out.copy_(x)),
        "add": 3 * x.nbytes / _median(setting, lambda: torch.add(x, y, out=out)),
        "read": x.nbytes / _median(setting, lambda: x.sum()),
    }
    said = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    return {"bytes_per_second": rates, "summary": f"{said} TB/s"}


def _product(setting: Setting, product: Product) -> dict[str, Any]:
    """Operations per second of bfloat16 factors: as they are, with a float32 result, and added to one."""
    generator = torch.Generator(device=setting.device).manual_seed(0)
    rows, inner, columns = product[1:]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device).bfloat16()

    a, b = normal(rows, inner), normal(columns, inner).t()
    half, wide = (torch.zeros(rows, columns, dtype=d, device=setting.device) for d in (torch.bfloat16, torch.float32))
    forms: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(a, b, out=half),
        "mm, float32 result": lambda: torch.mm(a, b, out_dtype=torch.float32, out=wide),
        "addmm, float32 sum": lambda: torch.addmm(wide, a, b, out_dtype=torch.float32, out=wide),
        "mm, float32 result, add_": lambda: wide.add_(torch.mm(a, b, out_dtype=torch.float32)),
    }
    rates, errors = {}, {}
    for name, form in forms.items():
        try:
            rates[name] = 2 * rows * inner * columns / _median(setting, form)
        except (
            RuntimeError,
            TypeError,
        ) as error:  # a product that is not offered here: an answer, no fault
            errors[name] = str(error).splitlines()[0]
    said = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    return {"flops_per_second": rates, "not_here": errors, "summary": f"{said} TFLOP/s"}


def _chosen(setting: Setting) -> dict[str, Any]:
    """The form of products that `ops/gemm.py` uses here, and the tiles that `ops/tile_size.py` makes."""
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    tiles = {}
    for rows, columns in ((1024, 151936), (8192, 151936), (8192, 128256)):
        tiles[f"{rows} x {columns}"] = list(tile_size.tile_shape(rows, columns, 8, device))
    chosen = {str(dtype): str(gemm.output_dtype(dtype, device)) for dtype in (torch.bfloat16, torch.float16)}
    halves = (torch.bfloat16, torch.float16) if setting.device == "cuda" else ()  # the probe is of a GPU
    probed = {str(dtype): str(gemm.offered(device, dtype)) for dtype in halves}
    stored = chosen["torch.bfloat16"].removeprefix("torch.")
    said = f"bfloat16 products are stored as {stored}; tiles of {tiles['8192 x 151936']}"
    return {"stored_as": chosen, "probed": probed, "tiles": tiles, "summary": said}
