"""Calling reward functions of TRL's signature, and what they may log.

    reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> float | None each

All are keywords, and each function gets all of them. It is a function, a `functools.partial`, or an object with
`__call__`; each may be a coroutine function. ``log_metric(name, value)`` logs a number, of which the mean is taken;
``log_extra(column, values)`` a value per completion. None, and NaN, is no opinion on a completion. Source: TRL 1.16,
`GRPOTrainer._calculate_rewards`, whose names and whose treatment of results these are.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cmdp_fast import event_loop
from cmdp_fast.errors import InputError, kind_of, shown
from cmdp_fast.imports import import_function
from cmdp_fast.own_code import described, errors_named
from cmdp_fast.time_limits import Limit, told_of

if TYPE_CHECKING:
    from accelerate import Accelerator

RewardFunction = Callable[..., Any]

# What a function is told beside the columns of the dataset, which are passed under their own names but for these.
KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NO_COLUMNS = ("prompt", "completion", *KEYWORDS)


class RewardError(RuntimeError):
    """A reward function raised; the message names it and the place, and the cause is its exception."""


class Named(NamedTuple):
    """A reward function and the name under which it is logged."""

    name: str
    function: RewardFunction


class Given(NamedTuple):
    """What the reward functions are told of some completions; None where the trainer does not say it."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]] | None
    columns: Mapping[str, Sequence[Any]]
    trainer_state: Any


class Logged(NamedTuple):
    """What reward functions have logged: numbers of any count, and a plain value per completion in each column."""

    metrics: dict[str, list[float]]
    extra: dict[str, list[Any]]

    def rows(self) -> list[dict[str, Any]]:
        """The columns as a dict per completion; none where there are no columns."""
        return [dict(zip(self.extra, values, strict=True)) for values in zip(*self.extra.values(), strict=True)]


class Outcome(NamedTuple):
    """The rewards of each function in turn, NaN for no opinion, and what was logged."""

    rewards: list[list[float]]
    logged: Logged


def name_of(function: RewardFunction) -> str:
    """Its own name, that of the function in a partial, or that of an object's class; as TRL's."""
    while type(function) is functools.partial:
        function = function.func
    name = _attribute(function, "__name__")
    return name if type(name) is str else type(function).__name__


def import_reward(option: str, spec: str, built_in: Sequence[str] = ()) -> RewardFunction:
    """The reward function that ``module:name`` or ``path/file.py:name`` names; a class stands for an object of it, made
    without arguments. Raises InputError, which names the option, if there is none."""
    thing: Any = import_function(option, spec, built_in)
    if isinstance(thing, type):
        thing = _made(thing, f"{option} {spec}")
    function: RewardFunction = thing
    return function


def _made(kind: Any, what: str) -> Any:
    with errors_named(f"{what} is a class; name an object of it: it", kind.__init__):
        reward = kind()
    if not callable(reward):
        raise InputError(f"{what} is a class without __call__")
    return reward


def is_async(function: Any) -> bool:
    """Whether a call gives a coroutine: of a coroutine function, also in a partial or as an object's ``__call__``."""
    while type(function) is functools.partial:
        function = function.func
    try:
        return inspect.iscoroutinefunction(function) or (
            not isinstance(function, type) and inspect.iscoroutinefunction(function.__call__)
        )
    except KeyboardInterrupt:
        raise
    except BaseException:  # of an object of the user's
        return False


def _attribute(function: Any, name: str) -> Any:
    """None where a function has none, or an object of the user's raises."""
    try:
        return getattr(function, name, None)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None


def check_call(what: str, function: Any, keywords: Iterable[str], positional: int = 0) -> None:
    """Raises InputError if a function does not take a call with these keywords, after so many arguments without one, as
    far as Python can tell before."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # of what is called: a wrapper may take more
    except KeyboardInterrupt:
        raise
    except BaseException:  # of something without one, or of an object of the user's
        return
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        hint = "; **kwargs takes those that it has no name for" if "unexpected" in str(error) else ""
        raise InputError(f"{what} cannot be called with {', '.join(keywords)}: {error}{hint}") from error


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of the dataset that reward functions are told."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in NO_COLUMNS}


def own_copy(value: Any) -> Any:
    """What a function of the user's is given: a copy of lists and dicts, and of those in them, so that one that changes
    them changes nobody else's. Such as are too deep for that are passed as they are."""
    try:
        if type(value) is list:
            return [own_copy(each) if type(each) in (list, dict) else each for each in value]
        return {name: own_copy(each) for name, each in value.items()} if type(value) is dict else value
    except RecursionError:
        return value


def call(functions: Sequence[Named], given: Given, limit: Limit | None = None) -> Outcome:
    """Calls each function once, with the same arguments: plain ones in turn, then the coroutine functions together.

    One that does not return is told of in the log, and given up at the limit, where there is one and the function does
    not say that it ``limits_itself`` (`time_limits.told_of`): an InputError. Coroutine functions run in a thread of
    their own (`event_loop`), so this may be called where a loop runs already. If one raises, the others are cancelled.
    Raises RewardError for an exception of a function's own, InputError for an InputError of its own, for a result other
    than a number or None per completion (in a list, tuple, array or tensor), and if a column that was logged has not a
    value per completion. The message names the function, or the column.
    """
    answers = {i: _asked(named, given, limit) for i, named in enumerate(functions) if not is_async(named.function)}
    later = {i: named for i, named in enumerate(functions) if i not in answers}
    if later:
        names = ", ".join(named.name for named in later.values())
        with told_of(f"reward function {names}{_on(given)}", event_loop.THREAD, limit):
            try:
                awaited = event_loop.run(lambda: concurrently([_awaited(named, given) for named in later.values()]))
            except concurrent.futures.CancelledError as error:
                raise RewardError(f"reward function {names} cancelled tasks that are not its own") from error
        answers |= dict(zip(later, awaited, strict=True))
    return _outcome([answers[i] for i in range(len(functions))])


async def call_async(function: Named, given: Given) -> Outcome:
    """The same for one coroutine function, in the loop that is running."""
    return _outcome([await _awaited(function, given)])


async def concurrently(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all; if one raises, or this is cancelled, the others are cancelled and have ended before it is
    told."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def mean_metrics(logged: Logged, accelerator: Accelerator) -> dict[str, float]:
    """The mean of each metric over all that was logged under its name, in all processes. Every process must call it."""
    totals = {name: (sum(values), len(values)) for name, values in logged.metrics.items()}
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everyones = gather_object([totals])
        names = sorted({name for each in everyones for name in each})  # one order in all processes
        of = {name: [each[name] for each in everyones if name in each] for name in names}
        totals = {name: (sum(s for s, _ in parts), sum(n for _, n in parts)) for name, parts in of.items()}
    return {name: total / count for name, (total, count) in totals.items()}


def plain_value(value: Any) -> Any:
    """A value that can be written wherever samples are: None, bool, int, float or a text that is valid Unicode.

    Numbers of numpy and PyTorch become Python's; anything else its text. It may come from a completion, so it may be
    nested too deep to be printed, or be too long a number.
    """
    try:
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, int) and value.bit_length() < 64:
            return int(value)
        return _valid(str(value))
    except KeyboardInterrupt:
        raise
    except BaseException:  # of a `__str__` that is not ours; RecursionError, and ValueError for an int of many digits
        return f"<{kind_of(value)}>"


def returned(value: Any) -> str:
    """What a function has returned that takes no such thing, in a few words. A coroutine is closed."""
    if _is_coroutine(value):
        value.close()
        return "a coroutine"
    if issubclass(type(value), str):
        return _short(value)
    return repr(plain_value(value)) if issubclass(type(value), (bool, int, float)) else _kind(value)


def _is_coroutine(value: Any) -> bool:
    """What `inspect` says of a value, which is not asked for its class: it may answer anything."""
    return type(value) is CoroutineType


def _valid(text: str) -> str:
    """The text with half of a surrogate pair, which no file can hold, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _Answer(NamedTuple):
    """Of one function."""

    rewards: list[float]
    logged: Logged


def _outcome(answers: Sequence[_Answer]) -> Outcome:
    """All answers; where two functions log a column of the same name, the later one's."""
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    for answer in answers:
        extra |= answer.logged.extra
        for name, values in answer.logged.metrics.items():
            metrics.setdefault(name, []).extend(values)
    return Outcome([answer.rewards for answer in answers], Logged(metrics, extra))


def _on(given: Given) -> str:
    count = len(given.completions)
    return f" on {count} completion{'s' * (count != 1)}"


def _asked(named: Named, given: Given, limit: Limit | None) -> _Answer:
    logged = Logged({}, {})
    if _attribute(named.function, "limits_itself") is True:  # an object that has every attribute has that, too
        limit = None
    with told_of(f"reward function {named.name}{_on(given)}", limit=limit):
        try:
            result = named.function(**_arguments(given, logged))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            raise _of(named, error) from error
        return _checked(named, given, result, logged)


async def _awaited(named: Named, given: Given) -> _Answer:
    task = asyncio.ensure_future(_guarded(named, given))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    if task.cancelled():  # which would look as if its caller had been
        raise RewardError(f"reward function {named.name} raised CancelledError: nobody else has cancelled it")
    return task.result()


async def _guarded(named: Named, given: Given) -> _Answer:
    logged = Logged({}, {})
    try:
        result = await named.function(**_arguments(given, logged))
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # some of these would end the loop, and leave the caller
        raise _of(named, error) from error
    return _checked(named, given, result, logged)


def _arguments(given: Given, logged: Logged) -> dict[str, Any]:
    """The keywords of a function. Lists and dicts are its own, inner ones too: one that sorts, empties or fills them
    changes nobody else's."""

    def log_metric(name: str, value: Any) -> None:
        number = _number(value, f"log_metric({_short(name)}, ...) got", "expected a number")
        logged.metrics.setdefault(_text(name, "log_metric"), []).append(number)

    def log_extra(column: str, values: Any) -> None:
        logged.extra.setdefault(_text(column, "log_extra"), []).extend(map(plain_value, values))

    told = given._asdict()
    columns, ids = told.pop("columns"), told.pop("completion_ids")
    return {
        **{name: own_copy(value) for name, value in {**columns, **told}.items()},
        "completion_ids": ids if ids is None else [list(each) for each in ids],  # numbers: millions of them, none inner
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def _text(name: Any, function: str) -> str:
    if not isinstance(name, str):
        raise InputError(f"{function} takes a name and what to log, the name was {_kind(name)}")
    return _valid(name)


def _of(named: Named, error: BaseException) -> Exception:
    if isinstance(error, InputError):
        return InputError(f"reward function {named.name}: {error}")
    return RewardError(f"reward function {named.name} raised {described(error, named.function)}")


def _checked(named: Named, given: Given, result: Any, logged: Logged) -> _Answer:
    """The result as numbers, NaN for None. Raises InputError for what TRL could not make a column of rewards of, for
    what has no order, and for columns that were logged of another length; RewardError for what the result's own code
    raises."""
    try:
        return _read(named, given, result, logged)
    except (KeyboardInterrupt, InputError, RewardError):
        raise
    except BaseException as error:
        raise _of(named, error) from error


def _read(named: Named, given: Given, result: Any, logged: Logged) -> _Answer:
    name, count = named.name, len(given.completions)
    if _is_coroutine(result):
        result.close()
        raise InputError(f"reward function {name} returned a coroutine: expected it to be defined with `async def`")
    wanted = f"expected {count} numbers or None, one per completion"
    unordered = isinstance(result, (str, bytes, Mapping, AbstractSet))
    try:
        if isinstance(result, torch.Tensor):
            result = result.detach().cpu()
        values = list(() if unordered else result)
    except TypeError:
        unordered = True
    if unordered:
        raise InputError(f"reward function {name} returned {_kind(result)}; {wanted}")
    if len(values) != count:
        raise InputError(f"reward function {name} returned {len(values)} rewards for {count} completions")
    if coroutines := [value for value in values if _is_coroutine(value)]:
        for coroutine in coroutines:
            coroutine.close()
        raise InputError(f"reward function {name} returned coroutines; {wanted}")
    rewards = [
        math.nan if value is None else _number(value, f"reward function {name} returned for completion {i}", wanted)
        for i, value in enumerate(values)
    ]
    for column, items in logged.extra.items():
        if len(items) != count:
            raise InputError(
                f"reward function {name}: log_extra({_short(column)}, ...) got {len(items)} values for {count} "
                "completions"
            )
    return _Answer(rewards, logged)


def _number(value: Any, what: str, wanted: str) -> float:
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().squeeze()
            if value.is_complex():
                raise TypeError
        # Takes what it takes of TRL: no text
        [number] = torch.tensor([value], dtype=torch.float64, device="cpu").tolist()
        return float(number)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of a `__float__` that is not ours
        raise InputError(f"{what} {_kind(value)}; {wanted}") from error


def _kind(value: Any) -> str:
    """What a value is, without the value, which may hold a completion."""
    if value is None:
        return "None"
    kind, shape = f"a value of type {kind_of(value)}", _attribute(value, "shape")
    if type(shape) is tuple or type(shape) is torch.Size:
        return f"{kind} and shape {shown(tuple(shape))}"
    return kind


def _short(name: Any) -> str:
    text = str(plain_value(name))
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
