"""What a function of the user's may leave otherwise in this process, and the training goes on with: put back.

Without that a run would go on in another precision, write its files into another folder, sample the same random numbers
in each step, or say nothing more, and nothing would show it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from cmdp_fast.errors import InputError

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()


class _Setting(NamedTuple):
    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _put_device(device: torch.device) -> None:
    torch.set_default_device(None)  # what it was, mostly; to name one slows every call down
    if torch.get_default_device() != device:
        torch.set_default_device(device)


def _cudnn() -> tuple[bool, ...]:
    flags = torch.backends.cudnn
    return flags.enabled, flags.benchmark, flags.deterministic


def _put_cudnn(given: tuple[bool, ...]) -> None:
    for name, flag in zip(("enabled", "benchmark", "deterministic"), given, strict=True):
        setattr(torch.backends.cudnn, name, flag)


_SETTINGS: tuple[_Setting, ...] = (
    _Setting("the working directory", os.getcwd, os.chdir),
    _Setting("PyTorch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("PyTorch's default device", torch.get_default_device, _put_device),
    _Setting("PyTorch's number of threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("whether PyTorch takes gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting(
        "whether PyTorch is deterministic",
        _deterministic,
        lambda given: torch.use_deterministic_algorithms(given[0], warn_only=given[1]),
    ),
    _Setting(
        "PyTorch's precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _Setting(  # of torch 2.9 and newer
        "PyTorch's precision of float32",
        lambda: torch.backends.fp32_precision,  # type: ignore[attr-defined]
        lambda given: setattr(torch.backends, "fp32_precision", given),
    ),
    _Setting("cuDNN's settings", _cudnn, _put_cudnn),
    _Setting("sys.stdout", lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    _Setting("sys.stderr", lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
)
_SIGNALS = (  # in the main thread: elsewhere Python allows no handlers
    _Setting(
        "the handler of SIGINT", lambda: signal.getsignal(signal.SIGINT), lambda h: signal.signal(signal.SIGINT, h)
    ),
    _Setting(
        "the handler of SIGTERM", lambda: signal.getsignal(signal.SIGTERM), lambda h: signal.signal(signal.SIGTERM, h)
    ),
)


@contextmanager
def unchanged(what: str, samples: bool = False) -> Iterator[None]:
    """Puts back what the body leaves otherwise of this process's working directory, standard streams, handlers of
    Ctrl-C and SIGTERM, and of PyTorch's default dtype and device, threads, gradient mode, determinism and precision of
    products; each is said once in the log, with ``what`` as whose it is. An alarm that the body has set and left is
    called off: it would end the process, or raise in the middle of a step.

    They are the process's: what another thread changes meanwhile is taken for the body's, and undone. So no thread may
    redirect streams or change folders for a while beside a training.

    Random numbers that the body draws by PyTorch's own generators are not drawn again by the training, and a seed that
    it sets does not reach it: the training goes on from a seed that it draws itself. With ``samples`` they are the
    body's business. Those of `random` and numpy are not drawn from elsewhere, and stay as the body leaves them.

    A process that the body has forked ends where it would go on as a second training. Raises InputError for an
    `inference_mode` that is left on: nobody else can leave it.
    """
    pid, settings = os.getpid(), _SETTINGS
    if threading.current_thread() is threading.main_thread():
        settings += _SIGNALS
    before = [_of(setting) for setting in settings]
    inference, alarm, drawn = torch.is_inference_mode_enabled(), _alarm(), None if samples else _drawn()
    try:
        yield
    finally:
        if os.getpid() != pid:
            with suppress(OSError):
                os.write(2, f"cmdp-fast: {what} has forked a process that came back from it: it is ended\n".encode())
            os._exit(1)
        for setting, value in zip(settings, before, strict=True):
            if value is not None and _of(setting) != value:
                with suppress(Exception):  # a folder that is gone
                    setting.put(value)
                if (what, setting.name) not in _told:
                    _told.add((what, setting.name))
                    _log.warning("%s has left %s changed: it is put back. This is said once", what, setting.name)
        if not alarm and _alarm():
            signal.setitimer(signal.ITIMER_REAL, 0)
        if drawn is not None:
            _draw_no_more(drawn)
    if torch.is_inference_mode_enabled() != inference:
        raise InputError(f"{what} has left torch.inference_mode on: use it as a `with`, or as a decorator")


def _of(setting: _Setting) -> Any:
    """Its value; None where it cannot be asked, as of a folder that is gone."""
    with suppress(Exception):
        return setting.get()
    return None


def _alarm() -> float:
    return signal.getitimer(signal.ITIMER_REAL)[0] if hasattr(signal, "getitimer") else 0.0


def _drawn() -> list[torch.Tensor]:
    """Where PyTorch's generators stand, of the CPU and of this process's GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _draw_no_more(before: list[torch.Tensor]) -> None:
    now = _drawn()
    if all(torch.equal(one, other) for one, other in zip(before, now, strict=False)):
        return
    torch.set_rng_state(before[0])
    # Other numbers in each call, also where the training itself draws none from this generator: to put it back alone
    # would have a function that is random draw the same ones each time
    torch.manual_seed(int(torch.randint(2**63 - 1, ())))
