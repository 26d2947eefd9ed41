"""Instructions per column that the CPU's kernels execute, counted by QEMU: no processor of the architecture is needed.

    python benchmarks/cpu_instructions.py --cpu max,sve-max-vq=2

Needs a compiler for the architecture and QEMU's user emulation (Debian: g++-aarch64-linux-gnu, qemu-user). A count is
the difference between a row and one of twice its width, so that it is of the loops alone; all instructions of the
kernels count, those that convert float16 included. It says nothing about time: processors differ in how many of which
instructions they begin in a cycle.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import cmdp_fast as cf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import emulated

WIDTH = 16896  # whole segments for vectors of 4 and 8 floats
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, width, generator=generator).mul(3).to(dtype) for _ in "xy")
    return x, y, torch.zeros(1, dtype=torch.int64)


def statistics(width: int, dtype: torch.dtype) -> None:
    cf.token_stats(*rows(width, dtype), backend="cpu")


def backward(*names: str) -> Callable[[int, torch.dtype], None]:
    """The statistics and the gradient of some."""

    def call(width: int, dtype: torch.dtype) -> None:
        x, y, tokens = rows(width, dtype)
        stats = cf.token_stats(x.requires_grad_(), y, tokens, backend="cpu")
        torch.autograd.grad(sum(getattr(stats, name).sum() for name in names), x)

    return call


def divergence(width: int, dtype: torch.dtype) -> None:
    x, y, _ = rows(width, dtype)
    cf.divergence(x, y, kind="jsd", backend="cpu")


def divergence_backward(width: int, dtype: torch.dtype) -> None:
    x, y, _ = rows(width, dtype)
    cf.divergence(x.requires_grad_(), y, kind="jsd", backend="cpu").sum().backward()


# What is called, and what of it is to be taken off: the forward pass of a backward one.
CASES: dict[str, tuple[Callable[[int, torch.dtype], None], str | None]] = {
    "statistics": (statistics, None),
    "gradient, no teacher": (backward("logprob", "entropy"), "statistics"),
    "gradient, reverse KL": (backward("reverse_kl"), "statistics"),
    "gradient, all": (backward("reverse_kl", "forward_kl", "logprob", "entropy"), "statistics"),
    "JSD and its first pass": (divergence, None),
    "gradient of the JSD": (divergence_backward, "JSD and its first pass"),
}


def kernels_of(program: Path, objdump: str) -> tuple[dict[int, str], str]:
    """The instructions of all kernels by address, and the range that they lie in."""
    text = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", program], check=True, capture_output=True, text=True
    )
    code = {}
    for function in re.split(r"\n(?=[0-9a-f]{16} <)", text.stdout):
        if re.match(r"[0-9a-f]+ <.*cmdp::(x86_64_v\d|baseline|neon|sve_\d+)::", function):
            code |= {int(a, 16): i.strip() for a, i in re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", function, re.MULTILINE)}
    return code, f"{min(code):#x}..{max(code) + 15:#x}"


@dataclass(frozen=True)
class Counter:
    """Counts what one variant of the kernels executes on one processor. `span`: of the kernels' addresses."""

    target: emulated.Target
    cpu: str
    variant: str
    span: str

    def executed(self, call: Callable[[], None]) -> collections.Counter[int]:
        """How often each instruction ran, by address."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            usage = subprocess.run([self.target.emulator, "--help"], capture_output=True, text=True).stdout
            one = "-one-insn-per-tb" if "-one-insn-per-tb" in usage else "-singlestep"  # the latter until QEMU 8.1
            options = (one, "-d", "exec,nochain", "-dfilter", self.span, "-D", str(log))
            module = emulated.Emulated(self.cpu, self.target, options)
            module.set_variant(self.variant)
            with emulated.in_place_of_native(module):
                call()
            module.close()
            with open(log, encoding="ascii", errors="replace") as lines:
                return collections.Counter(int(row.split("/", 2)[1], 16) for row in lines if row.startswith("Trace"))

    def in_loops(self, name: str, dtype: torch.dtype) -> collections.Counter[int]:
        """The same of a case's loops, for WIDTH columns."""
        case, less = CASES[name]
        ran = self.executed(partial(case, 2 * WIDTH, dtype))
        ran.subtract(self.executed(partial(case, WIDTH, dtype)))
        if less is not None:
            ran.subtract(self.in_loops(less, dtype))
        return ran


COPIES = re.compile(
    r"mov\s+v\d+\.16b|mov\s+z\d+\.\w, z|movprfx|v?movap[sd]\s+%[xyz]mm\d+,%[xyz]mm|vmovdqa\w*\s+%[xyz]mm\d+,%[xyz]mm"
)
STACK = re.compile(r"\[sp|\(%rsp|\(%rbp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(emulated.TARGETS), default="aarch64")
    parser.add_argument("--cpu", default="max", help="QEMU's name of the processor, with its features")
    parser.add_argument("--variants", nargs="*", help="of the kernels; all that the processor runs, if none are named")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = emulated.TARGETS[options.arch]
    code, span = kernels_of(emulated.build(target), target.objdump)
    module = emulated.Emulated(options.cpu, target)
    variants = options.variants or [name for name, runs in module.variants() if runs]
    module.close()
    print(f"{'per column':12}{'kernel':26}{'dtype':10}{'instructions':>13}{'of them copies':>16}{'on the stack':>14}")
    for variant in variants:
        counter = Counter(target, options.cpu, variant, span)
        for dtype, name in itertools.product(DTYPES, options.cases):
            ran = counter.in_loops(name, dtype)
            copies, stack = (sum(n for a, n in ran.items() if p.search(code[a])) / WIDTH for p in (COPIES, STACK))
            kind = str(dtype).removeprefix("torch.")
            print(f"{variant:12}{name:26}{kind:10}{ran.total() / WIDTH:13.2f}{copies:16.2f}{stack:14.2f}", flush=True)


if __name__ == "__main__":
    main()
