"""Every call of the native module checks every argument: nothing is read of an address that is not there."""

import math

import pytest
import torch
from helpers import make_logits

from cmdp_fast.cpu import matrix, native

pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")


def room():
    """Memory of its own for one argument: zeros, which are also tokens and ids."""
    return torch.zeros(64, dtype=torch.float64)


SHAPE = (2, 8)  # a shape stands for a matrix of float32
PAIR = {"student": SHAPE, "teacher": SHAPE}
ROWS = {"mask": 0, "vocab": 8, "temperature": 1.0}
MIXED = PAIR | ROWS | {"b": 0.5, "c_teacher": 1.0, "c_student": 1.0, "saved": room}
LISTED = {"student": SHAPE, "ids": room, "listed": 3, "tokens": room} | ROWS | {"first_column": 0}
SEQUENCES = {"mask": 0, "offsets": 0, "count": 2, "total": 4}
PAID = ("cmdp", True, 1.0, 1.0, 0.0, 10.0)
OUT = {"out": SHAPE, "threads": 1}
# The arguments of calls that pass, in their order.
RIGHT = {
    "token_stats": PAIR | {"tokens": room} | ROWS | {
        "statistics": [room] * 6, "wide": True, "saved": room, "threads": 1},
    "token_stats_backward": PAIR | {"tokens": room} | ROWS | {"upstream": [room] * 4, "saved": room} | OUT | {
        "first_column": 0},
    "mixture": MIXED | {"value": room, "mean": room, "threads": 1},
    "mixture_backward": MIXED | {"mean": room, "upstream": room} | OUT,
    "update_states": PAIR | {
        "tokens": room, "first_column": 0, "temperature": 1.0, "states": room, "threads": 1, "mask": 0},
    "update_tails": LISTED | {"states": [room] * 3, "threads": 1},
    "tail_backward": LISTED | {"gradient": [room] * 6} | OUT,
    "budget_trace": {"cost": room, "wide": True} | SEQUENCES | {
        "limits": room, "budget": (1.0, False, False), "trace": [room] * 5, "reward": PAID, "task_reward": room,
        "result": room, "threads": 1},
    "modified_reward": {"task_reward": room, "cost": room, "wide": True} | SEQUENCES | {
        "trace": [room] * 4, "reward": PAID, "result": room},
}  # fmt: skip


def call(function, **changed):
    """Calls with the right arguments, but these."""
    assert set(changed) <= set(RIGHT[function])
    owned = []

    def made(argument):
        if isinstance(argument, list):
            return [made(each) for each in argument]
        if argument is room:
            argument = room()
        elif argument in (SHAPE, (0, 8), (1, 8), (3, 8), (2, 9), (2, 7), (2, 0)):
            owned.append(torch.zeros(argument))
            return matrix(owned[-1])
        if isinstance(argument, torch.Tensor):
            owned.append(argument)
            return argument.data_ptr()
        return argument

    getattr(native, function)(*[made(argument) for argument in (RIGHT[function] | changed).values()])


@pytest.mark.parametrize("function", RIGHT)
def test_right_calls_pass_and_for_nothing_null_pointers_do(function):
    call(function)
    right = RIGHT[function]
    nothing = {"count": 0, "total": 0} if "total" in right else {}
    for name, argument in right.items():
        if argument == SHAPE:
            nothing[name] = (0, 8)
        elif argument is room:
            nothing[name] = 0
        elif isinstance(argument, list):
            nothing[name] = [0] * len(argument)
    call(function, **nothing)
    for name in {"states", "gradient"} & set(right) if "listed" in right else ():  # rows of which nothing is listed
        last = 1 if name == "states" else 5
        call(function, listed=0, ids=0, **{name: [0 if i == last else room for i in range(len(right[name]))]})
    if function == "budget_trace":
        call(function, **nothing | {"count": 2, "limits": room, "trace": [0, 0, 0, room, 0]})  # sequences of no tokens
        call(function, reward=None, task_reward=0, result=0)
        call(function, **nothing | {"limits": 1.0})
        call(function, offsets=torch.tensor([0, 0, 4]))
    if function == "token_stats":
        call(function, statistics=[0] * 6, tokens=0)  # the saved numbers alone
    if function == "update_states":
        call(function, student=(2, 0), teacher=(2, 0))  # a tile without columns


def wrong_calls():
    for function, right in RIGHT.items():
        for name, argument in right.items():
            if argument is room:
                yield function, {name: 0}, f"{'reward' if name == 'result' else name} is a null pointer"
        for name in {"states", "trace", "gradient"} & {name for name in right if isinstance(right[name], list)}:
            for i in range(len(right[name])):
                null = [0 if j == i else room for j in range(len(right[name]))]
                yield function, {name: null}, "is a null pointer"
        if "teacher" in right:
            for rows in (1, 3):
                yield function, {"teacher": (rows, 8)}, "different numbers of rows"
        if "vocab" in right:
            for vocab in (0, 9):
                yield function, {"vocab": vocab}, "vocab is outside the width"
            for name in {"student", "teacher"} & set(right):
                yield function, {name: (2, 7)}, "vocab is outside the width"
        if "threads" in right:
            yield function, {"threads": 0}, "threads must be at least 1"
        if "out" in right:
            for out in ((3, 8), (2, 9), matrix(make_logits(2, 8, dtype=torch.float64)) if native else None):
                yield function, {"out": out}, "the gradient must have the rows, width and dtype"
        if "b" in right:
            for weight in (0.0, 1.0, math.nan):
                yield function, {"b": weight}, "strictly between 0 and 1"
        if "total" in right:
            for sizes in ({"total": 5}, {"count": 0}, {"count": 3}):
                yield function, sizes, "must have the same number of tokens"
            for sizes in ({"count": -1}, {"count": -1, "total": -4}, {"total": -4}):
                yield function, sizes, "negative sizes"
            for offsets in ([1, 2, 4], [0, 2, 5]):
                yield function, {"offsets": torch.tensor(offsets)}, "begin with 0 and end with the number of tokens"
            for offsets in ([0, 5, 4], [0, -1, 4]):
                yield function, {"offsets": torch.tensor(offsets)}, "must not decrease"
            yield function, {"reward": ("ppo", *PAID[1:])}, "reward kind 'ppo' is unknown"
    yield "update_states", {"teacher": (2, 9)}, "have different widths"
    for tokens in ([8, 0], [0, 8], [-1, 0]):
        yield "token_stats", {"tokens": torch.tensor(tokens)}, "tokens: an index is outside the vocabulary"


@pytest.mark.parametrize("function, changed, message", list(wrong_calls()))
def test_wrong_calls_raise(function, changed, message):
    with pytest.raises(ValueError, match=message):
        call(function, **changed)


@pytest.mark.parametrize(
    "address, dtype, sizes, strides, width",
    [
        (0, "float32", [0], [8], 8),
        (0, "float32", [2], [0], 0),
        (66, "bfloat16", [2], [0], 8),  # every row the same one
        (68, "float32", [1] * 8, [1] * 8, 8),
        (64, "float32", [0], [2**62], 8),  # however far apart the rows that it has not
        (64, "float32", [2], [2**60], 8),
    ],
)
def test_right_matrices(address, dtype, sizes, strides, width):
    made = native.Matrix(address, dtype, sizes, strides, width)
    assert (made.rows, made.width) == (math.prod(sizes), width)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((64, "float32", [2, 2], [8], 8), "as many strides"),
        ((64, "float32", [5], [2**62], 8), "overflows 64 bits"),
        ((64, "float32", [2] * 4, [2**62] * 4, 8), "overflows 64 bits"),
        ((64, "bfloat16", [2], [2**62], 8), "overflows 64 bits"),
        ((66, "float32", [2], [8], 8), "not aligned"),
        ((68, "float64", [2], [8], 8), "not aligned"),
        ((65, "float16", [2], [8], 8), "not aligned"),
    ],
)
def test_wrong_matrices_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        native.Matrix(*arguments)


@pytest.mark.parametrize("ids, times", [([5], 3_000_000), ([3_999_000, 3], 1), ([-(2**62), 2**62], 1)])
def test_ids_that_do_not_ascend_make_a_wrong_result_and_no_harm(ids, times):
    """More of one block than it has columns, not ascending, or far outside; so many and so far that, if they were
    followed, it would be outside of any stack."""
    vocab, listed, tokens = 4_000_000, torch.tensor(ids).repeat(times), torch.tensor([7])
    student = torch.linspace(-5, 5, vocab)[None]
    rows = {"student": matrix(student), "ids": listed, "listed": len(listed), "tokens": tokens, "vocab": vocab}
    fields = torch.tensor([[-math.inf, 0.0, 0.0, math.inf]], dtype=torch.float64)
    numbers = torch.full((len(listed),), -math.inf, dtype=torch.float64)
    call("update_tails", **rows, states=[fields, numbers, room])
    out = torch.empty_like(student)
    call("tail_backward", **rows, gradient=[room] * 5 + [torch.zeros_like(numbers)], out=matrix(out))
    assert fields.isfinite().all() and not out.any()
    if times == 1 and ids[0] > 0:  # found in its block; the one that comes too late is not
        rest = student.double().index_fill(1, listed[:1], -math.inf)
        assert fields[0, 0] + fields[0, 1].log() == pytest.approx(rest.logsumexp(-1).item(), rel=1e-5)
