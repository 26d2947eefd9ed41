"""The short way to a compiled kernel ends where Triton's JIT would have gone, with a driver that launches nothing."""

import contextlib
import importlib
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.runtime import driver

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter")


class Place(NamedTuple):
    first: int
    second: int


class Given(NamedTuple):
    source: torch.Tensor
    mask: torch.Tensor | None
    place: Place
    factor: float


class Settings(NamedTuple):
    width: int
    name: str


@triton.jit
def plain_kernel(target, given, count, number: tl.float64, settings, TWICE: tl.constexpr):
    columns = tl.arange(0, settings.width)
    value = tl.load(given.source + given.place.first + columns * given.place.second).to(tl.float32) * given.factor
    if given.mask is not None:
        value = tl.where(tl.load(given.mask + columns) != 0, value, 0.0)
    if TWICE:
        value = value * 2
    tl.store(target + columns, value + number.to(tl.float32), mask=columns < count)


@pytest.fixture
def gpu():
    """A driver that keeps what it is asked to launch."""
    benchmark = importlib.import_module("host_cost")
    launched = []

    class Recorder(benchmark.IdleGPU):
        def launcher_cls(self, source, metadata):
            return lambda *given: launched.append(given)

    recorder = Recorder(benchmark.TARGETS["90"])
    recorder.launched = launched
    driver.set_active(recorder)
    yield recorder
    with contextlib.suppress(RuntimeError):  # there is no other
        driver.reset_active()


def arguments():
    """Everything that Triton specialises on, and what it does not, one thing changed at a time and two at a time."""
    from cmdp_fast.kernels.shapes import constants

    memory = torch.zeros(4096)
    choices = {
        "target": [memory, memory[1:], memory[4:], memory.double()],
        "source": [memory, memory[2:], memory.half()],
        "mask": [None, memory.to(torch.uint8), memory.to(torch.uint8)[1:]],
        "first": [0, 1, 16, 17, 2**31, True],
        "second": [1, 2, 32],
        "factor": [0.5, 1.0, float("nan")],
        "count": [8, 1, 7, 2**40],
        "number": [0.0, 1.0],
        "settings": [constants(Settings(16, "a")), constants(Settings(32, "a")), constants(Settings(16, "b"))],
        "twice": [False, True],
        "warps": [1, 2],
    }
    first = {name: values[0] for name, values in choices.items()}
    seen = [first]
    for name, values in choices.items():
        seen += [first | {name: value} for value in values[1:]]
    for one, other in itertools.combinations(choices, 2):
        seen.append(first | {one: choices[one][-1], other: choices[other][-1]})
    return seen


def run(kernel, given, programs=3):
    place = Place(given["first"], given["second"])
    return kernel[(programs,)](
        given["target"],
        Given(given["source"], given["mask"], place, given["factor"]),
        given["count"],
        given["number"],
        given["settings"],
        TWICE=given["twice"],
        num_warps=given["warps"],
    )


def test_it_takes_the_kernel_that_the_jit_takes(gpu):
    from cmdp_fast.kernels.direct import direct

    kernel = direct(plain_kernel)
    given = arguments()
    for _ in range(2):  # the first time it asks the JIT, the second it knows
        for one in given:
            known = len(kernel.compiled)
            gpu.launched.clear()
            run(kernel, one)
            (launched,) = gpu.launched
            compiled = run(plain_kernel, one)
            assert compiled.function == launched[4] and compiled.packed_metadata == launched[5]
            assert compiled in kernel.compiled.values()
            # Programs, stream, hooks and all arguments, in the order of the kernel's parameters.
            for a, b in zip(launched, gpu.launched[-1], strict=True):
                assert a is b or a == b or type(a) is type(b) is LazyDict, (one, a, b)
            assert _ == 0 or len(kernel.compiled) == known
    assert len({id(c) for c in kernel.compiled.values()}) > 20


def test_a_key_tells_arguments_apart():
    """Whatever is equal to Python but not to a compiler, and tuples whose members would read alike in a row."""
    from cmdp_fast.kernels.direct import describe

    def key(*values):
        parts: list[object] = []
        describe(values, parts)
        return tuple(parts)

    constant = triton.language.constexpr
    given = [
        (1,),
        (True,),
        (1.0,),
        (None,),
        (constant(1),),
        (constant(True),),
        (constant(1.0),),
        ((1,),),
        ((True,),),
        ((1.0,), (None, 0)),
        ((1.0, (None,)), 0),
    ]
    for one, other in itertools.combinations(given, 2):
        assert [(k, type(k)) for k in key(*one)] != [(k, type(k)) for k in key(*other)] and key(*one) != key(*other)

    class Count(int):
        pass

    assert key(Count(3)) != key(Count(4)) and key(Count(3)) == key(Count(3))
