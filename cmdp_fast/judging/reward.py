"""A reward function whose judge is asked in processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .pool import IsolationError, Judges


class JudgedReward:
    """``reward(prompts, completions, **columns) -> list[float | None]``, TRL's signature.

    ``requests`` makes the judge's arguments for each completion from those of the call. After a call
    ``failures`` says for each completion why there is no verdict on it, "" where there is one. ``isolated=None``:
    where the machine can.
    """

    limits_itself = True  # each completion has its seconds, however many there are

    def __init__(
        self,
        judge: str,
        option: str,
        requests: Callable[..., list[dict[str, Any]]],
        *,
        seconds: float,
        isolated: bool | None,
        arguments: dict[str, Any] | None = None,
        insist: str = "",
    ) -> None:
        self.__name__ = judge  # TRL logs under it
        self.failures: list[str] = []
        self._requests = requests
        try:
            self._judges = Judges(
                option, judge, arguments, seconds=seconds, isolated=isolated is not False, insist=insist
            )
        except IsolationError:
            if isolated:
                raise
            self._judges = Judges(option, judge, arguments, seconds=seconds, isolated=False)

    def __call__(self, **columns: Any) -> Sequence[float | None]:
        verdicts = self._judges.ask(self._requests(**columns))
        self.failures = [verdict.failure for verdict in verdicts]
        return [verdict.score for verdict in verdicts]
