"""A training in its folder: from where it stands, through its steps, to the files that it leaves."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cmdp_fast.errors import InputError, Interrupted, ProcessLost, first_line, readable
from cmdp_fast.files import write_text
from cmdp_fast.masking import public
from cmdp_fast.teachers.teacher import Teacher

from .distributed import any_process, noticing_loss, of_main, share, together, whole_student
from .evaluate import evaluate
from .interrupts import Interrupts
from .material import Material
from .models.adapter import FrozenBase
from .models.saving import save_student
from .records.checkpoint import (
    checkpoints,
    folders_of_steps,
    load_checkpoint,
    load_weights,
    remove_checkpoint,
    remove_checkpoints,
    remove_older,
    remove_parts,
    save_checkpoint,
)
from .records.curves import plot_curves
from .records.ending import write_summary
from .records.figures import of_evaluation, of_step
from .records.form import check_records, form_of
from .records.metrics_log import MetricsLog
from .records.report import Report
from .records.run_folder import Beginning, make_run_folder, write_config
from .records.samples import samples_text, write_samples
from .records.session import Session, earlier
from .records.trust import words_again
from .settings.config import TrainConfig
from .settings.constraint import evaluation_constraint
from .settings.recorded import shared
from .step import CURES, Learner, NotFinite
from .tasks.data import shuffled

SAMPLES = 20


class Training:
    """A training in its folder, from where it stands to its end. `code` is that of its configuration (`code_of`)."""

    folder: Path
    log: MetricsLog

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        material: Material,
        report: Report,
        code: dict[str, str],
        session: Session,
    ) -> None:
        self.config, self.learner, self.material, self.report, self.code = config, learner, material, report, code
        self.accelerator, self.session = learner.accelerator, session
        self.began = self.saved = 0  # the steps before this session, and those of the last checkpoint
        self.earlier_sessions: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self.samples: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------- begin

    def begin(self, held: ExitStack, interrupts: Interrupts) -> None:
        """From the last checkpoint of the run to be resumed, or with a look at teacher and student and a new folder.

        `held` gets the new folder's lock, as it has that of a run to be resumed. From the moment that the folder is
        there an interrupt waits.
        """
        run = self.config.resume
        if run and of_main(lambda: bool(checkpoints(Path(run))), self.accelerator):
            self.folder = Path(run)
            trained, seed = self.learner.trained, self.config.seed
            self._restore(load_checkpoint(self.accelerator, trained, self.folder, self.report, seed))
        else:
            if self.config.eval_before:
                self._evaluate_teacher()
            if self.learner.collector.teacher_engine and self.config.entry.on_policy:
                self.learner.collector.teacher_engine.close()  # it is not sampled from again
            if self.config.eval_before:
                self._evaluate_before()
            interrupts.deferred, interrupts.waits = True, "making the folder of the run"
            self.folder = self._make_folder(held)
            with together(self.accelerator):
                self._drop_students_after(0)
                self.log = MetricsLog(self.folder, self.accelerator, self.config)
            if self.config.eval_before:
                self._log_evaluation(0, self.results["student_before"], self.samples["student_before"])
        with together(self.accelerator):
            if self.config.resume and self.accelerator.is_main_process:
                write_config(self.folder, self.config, self._beginning)

    def _evaluate_teacher(self) -> None:
        if isinstance(self.learner.teacher, Teacher):
            how = "--teacher-device cpu" if self.config.teacher_device else f"--teacher {self.config.teacher}"
            self.report.say(f"teacher        not evaluated: with {how} it cannot be sampled")
        else:
            self._evaluate("teacher", self.learner.teacher)

    def _evaluate_before(self) -> None:
        """The student, unless it has been seen as the teacher: an adapter begins as nothing, to the last bit. Not where
        another sampler draws, or a copy of a layer is float32 and the original bfloat16."""
        c = self.config
        others = c.teacher_temperature or c.rollout or c.lora_modules_to_save
        if isinstance(self.learner.teacher, FrozenBase) and not others:
            for kept in (self.results, self.samples):
                kept["student_before"] = kept["teacher"]
            self.report.say("student_before the same, without its adapter")
        else:
            self._evaluate("student_before", self.learner.student)

    def _make_folder(self, held: ExitStack) -> Path:
        """The run's folder, made by the main process; that of a run to be resumed is there and has no checkpoint."""
        from accelerate.utils import broadcast_object_list

        folder = [self.config.resume]
        with together(self.accelerator):
            if self.config.resume:
                self.report.say(f"{self.config.resume} has no checkpoint yet: it begins again")
            elif self.accelerator.is_main_process:
                folder = [str(make_run_folder(self.config, self._beginning, held, self.report.say))]
        return Path(broadcast_object_list(folder)[0])

    @property
    def _beginning(self) -> Beginning:
        """What the run's folder says beside the settings."""
        return Beginning(self.code, self.material.origin, self.accelerator.num_processes)

    def _state(self) -> dict[str, Any]:
        """The state in a checkpoint beside the models, the optimizer and the random numbers."""
        return {
            "ppo": self.learner.state_dict(),
            "schedule": self.learner.scheduler.state_dict(),
            "seconds": self.learner.clock.seconds,
            "metrics": self.log.steps,
            "evaluations": self.log.evaluations,
            "results": self.results,
            "samples": self.samples,
            "sessions": self._sessions(),
        }

    def _sessions(self) -> list[dict[str, Any]]:
        """What each session of the run was made with, this one's at last."""
        steps = (self.began, self.learner.steps_done)
        return [*self.earlier_sessions, self.session.record(self.config, self.accelerator, steps)]

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            check_records(state, self.config.eval_before)
            known = self.learner.scheduler.state_dict()
            schedule = {name: value for name, value in state["schedule"].items() if name in known}  # of any torch
            if "last_epoch" not in schedule or any(
                form_of(known[name]) != form_of(schedule[name]) for name in schedule
            ):
                raise ValueError("its schedule is of another form")
            self.learner.load_state_dict(state["ppo"])
            self.learner.scheduler.load_state_dict(schedule)
            self.learner.clock.seconds.update(state["seconds"])
            self.results, self.samples = state["results"], state["samples"]
        except Exception as error:  # it is as it was written, and was not written by this program
            said = readable(repr(error))
            raise InputError(f"{self.folder}: its last checkpoint is not one of such a run: {said}") from error
        done = self.began = self.saved = self.learner.steps_done
        self.earlier_sessions = earlier(state.get("sessions"))
        if done > self.config.steps:
            raise InputError(f"--steps {self.config.steps}: {self.folder} has {done} behind it")
        with together(self.accelerator):
            self._drop_students_after(done)
            if self.accelerator.is_main_process:  # a kill may have come between a new one and the end of the oldest
                for name in ("checkpoints", "students"):
                    remove_older(self.folder / name, self.config.keep)
            self.log = MetricsLog(self.folder, self.accelerator, self.config, state["metrics"], state["evaluations"])
        self.report.say(f"{self.folder} goes on after step {done}")

    # ------------------------------------------------------------------------------------- train

    def finish(self, interrupts: Interrupts) -> None:
        """The steps that are left, a last evaluation, and everything into the folder."""
        error: BaseException | None = None
        try:
            interrupts.deferred = True
            with noticing_loss(self.accelerator, self._what_is_left):
                self._train(interrupts)
                interrupts.waits = f"writing the checkpoint of step {self.learner.steps_done}"
                self._checkpoint_of_the_end()
                if any_process(interrupts.received, self.accelerator):
                    raise KeyboardInterrupt
                interrupts.waits = "leaving the last evaluation, then writing the student"
                interrupts.deferred = self.accelerator.num_processes > 1  # they cannot leave each at its own time
                self._evaluate("student_after", self.learner.student)
                self._log_evaluation(self.config.steps, self.results["student_after"], self.samples["student_after"])
        except KeyboardInterrupt as raised:
            error = raised
            if not self.report.quiet:  # what it says it says to the one who interrupts
                raise Interrupted from None
            raise
        except BaseException as raised:
            error = raised
            raise
        finally:
            interrupts.deferred, interrupts.waits = True, "writing the student and the summary"
            self._write(error, interrupts.hurried)
        if self.accelerator.is_main_process:
            if not self.config.checkpoint_every:
                remove_checkpoints(self.folder)
            remove_parts(self.folder)  # what a disk would not let go of before

    def _what_is_left(self) -> str:
        """Where the run stood when another process was lost, for each machine that is left."""
        done, steps = self.learner.steps_done, self.config.steps
        at = f"in step {done + 1} of {steps}" if done < steps else f"after step {done}, the last"
        kept = f"its last checkpoint is of step {self.saved}" if self.saved else "it has no checkpoint yet"
        return (
            f"{self.folder} stopped {at}; {kept}. Start it again on all machines with the same launcher and "
            f"`train --resume {shlex.quote(str(self.folder))}`, which may have another number of processes"
        )

    def _checkpoint_of_the_end(self) -> None:
        """Also where none is asked for: if the end of the run is stopped, it is made again from here."""
        try:
            self._checkpoint()
        except KeyboardInterrupt:
            if not checkpoints(self.folder):
                self._checkpoint()
            raise

    def _train(self, interrupts: Interrupts) -> None:
        c, material = self.config, self.material
        size = c.prompts_per_step * self.accelerator.num_processes
        batches = shuffled(len(material.problems), size, c.seed)
        for _ in range(self.learner.steps_done):
            next(batches)
        remaining = range(self.learner.steps_done + 1, c.steps + 1)
        upcoming = share(next(batches), self.accelerator)
        for step in self.report.track(remaining, f"training {self.folder}", before=self.learner.steps_done):
            if any_process(interrupts.received, self.accelerator):
                return
            chosen, constraint = upcoming, self.learner.constraint()
            upcoming = share(next(batches), self.accelerator) if step < c.steps else []
            if c.rollout_ahead:
                prompts = [material.prompts[i] for i in upcoming for _ in range(c.num_generations)]
                self.learner.collector.upcoming = prompts
            interrupts.waits = f"finishing step {step} of {c.steps}, then writing a checkpoint"
            metrics = self.learner.step([material.problems[i] for i in chosen], [material.prompts[i] for i in chosen])
            with together(self.accelerator):
                self.log.step(step, metrics)
            self.report.status(*of_step(metrics, constraint))
            if step < c.steps and c.save_student_every and step % c.save_student_every == 0:
                interrupts.waits = f"saving the student of step {step}, then writing a checkpoint"
                with self.report.doing("saving the student"):
                    self._save_student(step)
            if step < c.steps and c.eval_every and step % c.eval_every == 0:
                interrupts.waits = f"finishing the evaluation after step {step}, then writing a checkpoint"
                with self.report.doing("evaluating"):
                    self._log_evaluation(step, *self._evaluated(self.learner.student))
            if step < c.steps and c.checkpoint_every and step % c.checkpoint_every == 0:
                interrupts.waits = f"writing the checkpoint of step {step}"
                with self.report.doing("writing a checkpoint"):
                    self._checkpoint()

    def _checkpoint(self) -> None:
        done = self.learner.steps_done
        if done > self.saved:
            trained = self.learner.trained
            save_checkpoint(self.accelerator, trained, self.folder, done, self._state(), self.config.keep)
            self.saved = done

    def _save_student(self, step: int) -> None:
        """The student of a step into a folder of its own; older ones are removed once it is whole."""
        model, weights = whole_student(self.learner.student, self.accelerator)
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                name = f"step-{step:06d}"
                save_student(model, self.material.tokenizer, self.folder / "students", weights, name)
                remove_older(self.folder / "students", self.config.keep)

    def _drop_students_after(self, step: int) -> None:
        """Those of another future than the one that begins at this step."""
        if self.accelerator.is_main_process:
            for folder in folders_of_steps(self.folder / "students"):
                if int(folder.name.removeprefix("step-")) > step:
                    remove_checkpoint(folder)

    def _evaluated(self, policy: nn.Module, who: str = "") -> Any:
        """Without a name of whose they are the samples are not kept, and have no tokens."""
        report = self.report if who else None
        rows, clock = self.material.held_out, self.learner.clock
        return evaluate(self.learner.collector, policy, rows, clock, report, who, detailed=bool(who))

    def _evaluate(self, who: str, policy: Any) -> None:
        self.results[who], self.samples[who] = self._evaluated(policy, who)
        self.report.say(f"{who:<15}{of_evaluation(self.results[who])}")

    def _log_evaluation(self, step: int, result: dict[str, float], samples: list[dict[str, Any]]) -> None:
        with together(self.accelerator):
            self.log.evaluation(step, result, self._shown(samples))

    def _shown(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of an evaluation's samples those that are written as text: the first completions of the first problems."""
        return samples[:: self.config.eval_generations][:SAMPLES]

    # ------------------------------------------------------------------------------------- save

    def _write(self, error: BaseException | None, hurried: bool = False) -> None:
        """Everything into the folder, as far as it has come, and `summary.json` last. A file that cannot be written
        keeps no other away, and does not hide the error that ended the run. Of a run that is left in a hurry nothing
        that takes long."""
        c, folder, done = self.config, self.folder, self.learner.steps_done
        agreed = isinstance(error, (InputError, KeyboardInterrupt, type(None))) and not isinstance(error, ProcessLost)
        alone = self.accelerator.num_processes == 1
        step: int | None = None
        ruined = False
        if not hurried and (alone or agreed):  # otherwise the others are elsewhere, and do not help with the student
            step = done
            if isinstance(error, NotFinite) or (error is not None and self._of_no_step()):
                ruined, step = True, self._last_good() if alone or isinstance(error, NotFinite) else None
        if error is not None:
            self.report.say(self._what_ended(error, step, ruined))
        shown = ((who, self._shown(some)) for who, some in self.samples.items())
        constraint, accuracy = evaluation_constraint(c), self.results.get("teacher", {}).get("accuracy")
        writes: list[Callable[[], None]] = [self.log.close]
        if not hurried:
            writes += [
                lambda: write_samples(folder / "samples.jsonl", self.samples),
                lambda: write_text(folder / "samples.txt", samples_text(shown)),
                lambda: plot_curves(folder / "curves.png", self.log, constraint, accuracy),
            ]
        about: dict[str, Any] = {"student_step": None, "sessions": self._sessions()}
        if step is not None:
            model, weights = whole_student(self.learner.student, self.accelerator)

            def save() -> None:
                save_student(model, self.material.tokenizer, folder, weights)
                about["student_step"] = step

            writes.append(save)
        failures: list[Exception] = []
        ended = [error]  # or by the first file that cannot be written
        writes.append(lambda: write_summary(folder, summary(c, self.learner, self.results, done, ended[0]) | about))
        for write in writes if self.accelerator.is_main_process else []:
            try:
                write()
            except Exception as failure:  # also one of a library that draws or saves
                failures.append(failure)
                ended = [error or failures[0]]
                self.report.say(str(failure) if isinstance(failure, InputError) else repr(failure))
        if error is None:
            with together(self.accelerator):
                if failures:
                    raise failures[0]
        if not failures and not isinstance(error, KeyboardInterrupt):
            names = "summary.json metrics.jsonl tensorboard/ curves.png samples.txt samples.jsonl"
            self.report.say(f"{folder}: {'student/ ' if step is not None else ''}{names}")

    def _of_no_step(self) -> bool:
        """Whether the weights are those of a step that has not ended, or are ruined by what has ended it. Of several
        processes nobody looks for the latter: they may not all be there."""
        if self.learner.between or self.accelerator.num_processes > 1:
            return self.learner.between
        try:
            self.learner.check_weights()
        except Exception as error:  # also one of CUDA, after which nothing can be read any more
            # Want of memory, which the error that has ended the step still holds, says nothing of the weights: those
            # of the last step, which were looked at as it ended
            return not (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())
        return False

    def _last_good(self) -> int | None:
        """Has the student the weights of the last checkpoint, in place of those that are ruined; its step, None where
        there is none. Every process must call this."""
        try:
            if not of_main(lambda: bool(checkpoints(self.folder)), self.accelerator):
                return None
            return load_weights(self.accelerator, self.learner.trained, self.folder, self.report)
        except Exception as error:  # as after one of CUDA, where nothing can be done any more
            self.report.say(str(error) if isinstance(error, InputError) else repr(error))
            return None

    def _what_ended(self, error: BaseException, student: int | None, ruined: bool) -> str:
        """How far the run has come, what of it is kept, and how it goes on; `student`: the step whose weights are
        written to `student/`; `ruined`: those of the model were not."""
        folder, done, kept = self.folder, self.learner.steps_done, checkpoints(self.folder)
        interrupted, last = isinstance(error, KeyboardInterrupt), kept[-1].name if kept else ""
        parts = [f"{'interrupted' if interrupted else 'stopped by an error'} after step {done} of {self.config.steps}"]
        if ruined or student != done:
            there = "stays as it was" if (folder / "student").exists() else "is not written"
            parts.append(f"student/ has the weights of step {student}" if student is not None else f"student/ {there}")
        if isinstance(error, NotFinite):  # with the settings and the random numbers that have led here
            parts.append(f"{folder} keeps {last}" if kept else f"{folder} has no checkpoint")
            return f"{'; '.join(parts)}. Resumed, it comes to the same: begin a new run, {CURES}"
        parts.append(f"{folder} keeps {last}" if kept else f"{folder} has no checkpoint yet and begins again")
        again = ["cmdp-fast", "train", "--resume", str(folder), *words_again(self.config)]
        return f"{'; '.join(parts)}. To go on: {shlex.join(again)}"


def summary(
    config: TrainConfig, learner: Learner, results: dict[str, Any], steps: int, error: BaseException | None
) -> dict[str, Any]:
    """The contents of `summary.json`. `kernels` are the seconds of scoring and update inside the token statistics."""
    phases = ("rollout", "scoring", "update", "evaluation", "kernels")
    seconds = {phase: round(learner.clock.seconds.get(phase, 0.0), 3) for phase in phases}
    step = sum(seconds[phase] for phase in ("rollout", "scoring", "update"))
    interrupted = isinstance(error, KeyboardInterrupt)
    return {
        "budget": config.budget,
        **{who: results.get(who) for who in ("teacher", "student_before", "student_after")},
        "steps": steps,
        "interrupted": interrupted,
        "error": None if error is None or interrupted else public(first_line(error)),
        "seconds": seconds,
        "kernel_share_of_step": round(seconds["kernels"] / step, 4) if step else None,
        "pid": learner.pid.state_dict() if config.kind == "pid" else None,
        "config": shared(replace(config, resume="")),
    }
