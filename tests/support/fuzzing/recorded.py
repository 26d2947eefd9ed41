"""The native module, called wrongly before every right call: it has to raise and to leave all memory as it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cmdp_fast
from cmdp_fast import cpu
from fuzzing.draws import Draw

REFUSED = (ValueError, TypeError, RuntimeError, OverflowError)
STUB = Path(cmdp_fast.__file__).parent / "_C.pyi"
# Addresses of bytes can lie anywhere; the third of a trace's is that of `violated`.
OF_NUMBERS = ("tokens", "saved", "states", "value", "mean", "ids", "offsets", "limits", "cost", "task_reward", "result")
LISTS = ("statistics", "upstream", "states", "trace", "gradient")
HUGE = 2**62
COUNTS: dict[str, tuple[Any, ...]] = {
    "vocab": (0, -1, HUGE),
    "threads": (0, -1, -HUGE),
    "temperature": (0.0, -1.0, float("nan")),
    "listed": (-1, HUGE),
    "count": (-1, HUGE),
    "total": (-1, HUGE),
}
NO_VALUES: tuple[Any, ...] = (None, "text", 2**70, [], object())


def signatures() -> dict[str, list[str]]:
    """The parameters of every function of the module by name."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    return {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}


def wrongs(name: str, value: Any) -> Iterator[Any]:
    """Values in place of a right one, none of which can be meant."""
    yield from COUNTS.get(name, ())
    if name in OF_NUMBERS and type(value) is int and value:
        yield value + 1
    if name in LISTS and isinstance(value, list):
        yield value[:-1]
        yield [*value, 64]
        for i, address in enumerate(value):
            if address and not (name == "trace" and i == 2):
                yield [*value[:i], address + 1, *value[i + 1 :]]
    if name == "reward" and value is not None:
        yield ("none such", *value[1:])
        yield value[:-1]
    if name == "budget":
        yield value[:-1]


def _is_a_number(name: str, value: Any, wrong: Any) -> bool:
    """Whether a large integer may be meant as a number: of limits that are one for all, too."""
    return isinstance(wrong, int) and (isinstance(value, float) or name == "limits")


class Misused:
    """Stands for the native module: before a call it makes one of which an argument is wrong."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.right, self.parameters = draw, cpu.native, signatures()
        self.tried: list[tuple[str, str]] = []

    def __getattr__(self, function: str) -> Any:
        right = getattr(self.right, function)
        if function not in self.parameters or function in ("advise_huge_pages", "variant", "set_variant", "variants"):
            return right

        def call(*arguments: Any) -> Any:
            self._misuse(function, right, list(arguments))
            return right(*arguments)

        return call

    def _misuse(self, function: str, right: Any, arguments: list[Any]) -> None:
        names = self.parameters[function][: len(arguments)]
        place = self.draw.integer(0, len(arguments) - 1)
        name, value = names[place], arguments[place]
        options = [*wrongs(name, value)]
        if name not in ("mask", "reward", "wide"):  # None is no reward, and everything is true or false
            options += [v for v in NO_VALUES if not _is_a_number(name, value, v)]
        if isinstance(value, self.right.Matrix):
            options.append(self._other_rows(value))
        if not options:
            return
        arguments[place] = self.draw.random.choice(options)
        what = f"native.{function}({name}={arguments[place]!r}, in place of {value!r})"
        self.tried.append((function, name))
        try:
            right(*arguments)
        except REFUSED as error:
            assert str(error), what
        else:
            raise AssertionError(f"{what} was accepted")

    def _other_rows(self, matrix: Any) -> Any:
        """As many rows and one, at an address that nobody has."""
        return self.right.Matrix(64, "float32", [matrix.rows + 1], [matrix.width], matrix.width)
