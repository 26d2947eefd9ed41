"""What is known of the GPUs that predictions are made for: data sheets, and two rates that were once seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Data sheet figures; the clock is the usual one under load."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # per second
    # Seen on a card: a copy's bytes read plus written per second, and a bfloat16 product of 8192^3 in 10^12
    # floating-point operations per second. 0 where none was at hand.
    copied_terabytes: float = 0.0
    product_teraflops: float = 0.0

    @property
    def instructions(self) -> float:
        """Instructions of single threads that all schedulers issue per second."""
        return self.multiprocessors * self.gigahertz * 1e9 * 128


DEVICES = (
    Device("A100", "80", 108, 1.41, 2.04),
    Device("H100", "90", 132, 1.75, 3.35, copied_terabytes=3.0, product_teraflops=798.0),
    Device("H200", "90", 132, 1.75, 4.8, copied_terabytes=4.3, product_teraflops=784.0),  # 770 to 798 were seen
    Device("B200", "100", 148, 1.85, 8.0),
)
