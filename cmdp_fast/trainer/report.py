"""What a run shows: progress with the time left, a line of metrics a step, TensorBoard events, curves, samples."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import InputError, without_controls
from ..files import as_json, replacing, sync, write_text, writing
from .config import TrainConfig
from .constraint import Constraint

T = TypeVar("T")


class Clock:
    """Seconds spent in named phases. On a GPU it waits for the device at both ends of a phase."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, phase: str, since: float) -> None:
        """Adds the time since then to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - since

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body of a with statement."""
        since = self.now()
        try:
            yield
        finally:
            self.add(name, since)


class Report:
    """The console. Quiet, a line now and then instead of a moving bar, if CI is set or the output is no terminal.

    Of several processes only the main one has a console; the others are not `shown`.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.quiet = os.environ.get("CI", "").lower() not in ("", "0", "false") or not sys.stdout.isatty()
        self._status = ""

    def say(self, line: str) -> None:
        """Prints a line."""
        if self.shown:
            print(without_controls(line), flush=True)

    def status(self, text: str) -> None:
        """Sets what stands beside the bar that is running."""
        self._status = text

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """The items, with a bar and the time left."""
        self._status = ""
        yield from self._lines(items, description) if self.quiet or not self.shown else self._bar(items, description)

    def _lines(self, items: Sequence[T], description: str) -> Iterator[T]:
        every = max(1, len(items) // 10)
        self.say(description)
        start = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if self._status and (done % every == 0 or done == len(items)):
                left = (time.monotonic() - start) / done * (len(items) - done)
                self.say(f"  {done}/{len(items)}  {self._status}  {left:.0f} s left")

    def _bar(self, items: Sequence[T], description: str) -> Iterator[T]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(description, total=len(items), status="")
            for item in items:
                yield item
                progress.update(task, advance=1, status=self._status)


class MetricsLog:
    """`metrics.jsonl`, a line a step, and the same numbers for the trackers; the main process writes.

    A run that goes on begins with the `steps` and `evaluations` that its checkpoint knows; what the file has beyond
    them is cut off.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Any,
        config: TrainConfig,
        steps: Sequence[dict[str, Any]] = (),
        evaluations: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.steps, self.evaluations = list(steps), list(evaluations)
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        if accelerator.is_main_process:
            write_text(self._path, "".join(as_json(step) + "\n" for step in self.steps))
            with writing(folder):
                _start_trackers(accelerator, config, folder, len(self.steps))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a training step. Raises InputError if they cannot be written."""
        self.steps.append({"step": step, **metrics})
        if self._accelerator.is_main_process:
            with writing(self._path), open(self._path, "a", encoding="utf-8") as lines:
                lines.write(as_json(self.steps[-1]) + "\n")
            with writing(self._path.parent):
                self._accelerator.log(metrics, step=step)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Records an evaluation of the student after so many steps; it has its place in the curves."""
        self.evaluations.append({"step": step, **result})
        if self._accelerator.is_main_process:
            with writing(self._path.parent):
                self._accelerator.log({f"eval/{name}": value for name, value in result.items()}, step=step)

    def close(self) -> None:
        """Has the disk keep what was written, and ends the trackers."""
        if self._accelerator.is_main_process:
            with writing(self._path):
                sync(self._path)
                for tracker in self._accelerator.trackers:
                    tracker.finish()
        self._accelerator.trackers.clear()


def check_trackers(config: TrainConfig) -> None:
    """Raises InputError for a tracker whose package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--trackers {name}: it is not installed (pip install {name})")


def _start_trackers(accelerator: Any, config: TrainConfig, folder: Path, step: int) -> None:
    """The trackers under the run's name; TensorBoard forgets what it has of later steps than this."""
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    makers = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", folder, purge_step=step + 1),
        "wandb": lambda: WandBTracker("cmdp_fast", name=folder.name, dir=str(folder)),
        "trackio": lambda: TrackioTracker("cmdp_fast", name=folder.name),
    }
    accelerator.log_with = [makers[name]() for name in config.trackers]  # the folder did not exist before
    accelerator.init_trackers("cmdp_fast")
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # which would make a run of its own of them
            tracker.store_init_configuration(json.loads(as_json(asdict(config))))


def plot_curves(path: Path, log: MetricsLog, constraint: Constraint, teacher_accuracy: float) -> None:
    """Accuracy, cumulative KL, satisfaction: training batches as lines, evaluations as dots."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    comparable = constraint.cost == "reverse_kl" and not constraint.per_token
    budget = constraint.budget if comparable else None
    panels = (
        ("accuracy", "cmdp/accuracy", "accuracy", teacher_accuracy, "teacher"),
        ("cumulative KL (nats)", "cmdp/cumulative_kl", "mean_cumulative_kl", budget, "budget"),
        ("constraint satisfaction", "cmdp/constraint_satisfaction", "constraint_satisfaction", None, ""),
    )
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, training, held_out, level, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot([s["step"] for s in log.steps], [s[training] for s in log.steps], lw=1, alpha=0.7, label="training")
        axes.plot([e["step"] for e in log.evaluations], [e[held_out] for e in log.evaluations], "o-", label="held out")
        if level is not None:
            axes.axhline(level, color="black", ls="--", lw=1, label=label)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.legend()
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def samples_text(parts: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Completions as text for a terminal: a heading for each policy, then its samples, without control codes."""
    lines = []
    for heading, samples in parts:
        lines += [heading, "=" * len(heading)]
        for s in samples:
            verdict = "right" if s["correct"] else "wrong"
            budget = "within budget" if s["feasible"] else "OVER BUDGET"
            text = f"{s['prompt']}  ->  {s['completion']}   [{verdict}, {s['cumulative']:.2f}, {budget}]"
            lines.append(without_controls(text))
        lines.append("")
    return "\n".join(lines)
