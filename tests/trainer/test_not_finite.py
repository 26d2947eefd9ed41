"""A stop for numbers that are not finite: `student/` holds the last good weights or nothing, and it is said which."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_ending import command, left_by
from tiny_pair import learner_of, settings

from cmdp_fast.cli import main
from cmdp_fast.trainer import training
from cmdp_fast.trainer.distributed import whole_student
from cmdp_fast.trainer.methods.ppo import PPO
from cmdp_fast.trainer.step import Learner, NotFinite


def spoil(what: str, patch, at: int) -> None:
    """From the so-many-th step on ``what`` is not finite, after a minibatch that ruins the student."""
    update = Learner.update

    def ruined(self, *args):
        if self.steps_done + 1 == at:
            with torch.no_grad():
                next(p for p in self.student.parameters() if p.requires_grad).fill_(1e30)
            spoilt(self)
        return update(self, *args)

    def spoilt(learner) -> None:
        if what == "weight":
            with torch.no_grad():
                next(p for p in learner.student.parameters() if p.requires_grad).fill_(torch.nan)
            patch.setattr(Learner, "_accumulate", lambda *_: {"loss": torch.zeros(())})
        elif what == "loss":
            loss = PPO.loss

            def infinite(self, *args):
                value, figures, outputs = loss(self, *args)
                return value * torch.inf, figures, outputs

            patch.setattr(PPO, "loss", infinite)
        else:
            patch.setattr(Learner, "_accumulate", lambda *_: {"loss": torch.zeros(())})
            patch.setattr(Learner, "_clipped", lambda *_: torch.nan)

    patch.setattr(Learner, "update", ruined)


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory, one_thread):
    output = tmp_path_factory.mktemp("expected")
    assert main(command(pair, output, steps=3, checkpoint_every=1)) == 0
    return left_by(output / "r")


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_the_weights_of_the_last_checkpoint_are_kept(what, pair, tmp_path, expected, monkeypatch, capsys):
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        spoil(what, patch, at=3)
        assert main(command(pair, tmp_path, steps=3, checkpoint_every=1)) == 2
    told = capsys.readouterr()
    assert f"the {what}" in told.err.replace("a weight", "the weight") and "is not finite" in told.err
    assert "stopped by an error after step 2 of 3; student/ has the weights of step 2; " in told.out
    assert json.loads((folder / "summary.json").read_text())["student_step"] == 2
    kept = torch.load(folder / "checkpoints" / "step-000002" / "model.bin", weights_only=True)
    student = load_file(folder / "student" / "model.safetensors")
    assert student and all(torch.equal(value, kept[f"student.{name}"]) for name, value in student.items())
    assert main(["train", f"--resume={folder}"]) == 0  # after the cure
    assert left_by(folder) == expected


def test_without_a_checkpoint_there_is_no_student(pair, tmp_path, expected, monkeypatch, capsys):
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        spoil("gradient", patch, at=2)
        assert main(command(pair, tmp_path, steps=3)) == 2
    assert "student/ is not written; " in capsys.readouterr().out
    assert not (folder / "student").exists()
    assert json.loads((folder / "summary.json").read_text())["student_step"] is None
    assert main(["train", f"--resume={folder}"]) == 0
    assert left_by(folder) == expected


def test_a_checkpoint_that_cannot_be_read_either(pair, tmp_path, monkeypatch, capsys):
    """An older student stays, and nothing ruined takes its place."""
    folder = tmp_path / "r"
    assert main(command(pair, tmp_path, steps=1, checkpoint_every=1)) == 0
    before = (folder / "student" / "model.safetensors").read_bytes()
    spoil("loss", monkeypatch, at=2)

    def unreadable(*_):
        raise training.InputError("memory is short")

    monkeypatch.setattr(training, "load_weights", unreadable)
    assert main(["train", f"--resume={folder}", "--steps=2"]) == 2
    assert "memory is short" in (told := capsys.readouterr().out) and "student/ stays as it was; " in told
    assert (folder / "student" / "model.safetensors").read_bytes() == before


def test_every_weight_is_looked_at(pair):
    learner, _, _ = learner_of(settings(pair, baseline="gae"))
    learner.check_weights()
    *_, last = learner.method.value_head.parameters()
    with torch.no_grad():
        last.view(-1)[-1] = torch.inf
    with pytest.raises(NotFinite, match="a weight of the student"):
        learner.check_weights()
    model, _ = whole_student(learner.student, learner.accelerator)
    assert all(p.isfinite().all() for p in model.parameters())


def out_of_memory(what: str, patch, at: int) -> None:
    """In a step's first minibatch, with a weight spoilt or none, or in its second; or in the optimizer, which has
    changed some of the weights by then."""
    accumulate = Learner._accumulate
    if what == "optimizer":
        descend = Learner.descend

        def half(optimizer, *_):
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("CUDA out of memory")

        def halfway(self):
            if self.steps_done + 1 == at:
                self.optimizer.optimizer.register_step_pre_hook(half)
            return descend(self)

        patch.setattr(Learner, "descend", halfway)
        return

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    def fails(self, *args):
        if self.steps_done + 1 == at and (what != "second" or self.between):
            if what == "unseen":  # in the memory that is left not even a look at the weights has room
                patch.setattr(Learner, "check_weights", full)
            if what == "spoilt":
                with torch.no_grad():
                    next(p for p in self.student.parameters() if p.requires_grad).view(-1)[0] = torch.nan
            raise RuntimeError("CUDA out of memory")
        return accumulate(self, *args)

    patch.setattr(Learner, "_accumulate", fails)


@pytest.mark.parametrize("what", ["spoilt", "second"])
def test_weights_of_no_step_are_not_kept(what, pair, tmp_path, expected, monkeypatch, capsys):
    """Whatever ended it."""
    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        out_of_memory(what, patch, at=3)
        with pytest.raises(RuntimeError, match="out of memory"):
            main(command(pair, tmp_path, steps=3, checkpoint_every=2))
    assert "stopped by an error after step 2 of 3; student/ has the weights of step 2; " in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["student_step"] == 2
    kept = torch.load(folder / "checkpoints" / "step-000002" / "model.bin", weights_only=True)
    student = load_file(folder / "student" / "model.safetensors")
    assert student and all(torch.equal(value, kept[f"student.{name}"]) for name, value in student.items())
    assert main(["train", f"--resume={folder}"]) == 0
    assert left_by(folder) == expected


@pytest.mark.parametrize("what", ["first", "unseen", "second", "optimizer"])
def test_weights_of_a_step_are_kept_without_a_checkpoint(what, pair, tmp_path, monkeypatch, capsys):
    """An error before a step has changed a weight leaves those of the step before."""
    out_of_memory(what, monkeypatch, at=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(command(pair, tmp_path))
    whole = what in ("first", "unseen")
    assert (tmp_path / "r" / "student").exists() == whole
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["student_step"] == (1 if whole else None)
    assert ("student/ is not written; " in capsys.readouterr().out) != whole


def test_in_a_hurry_no_checkpoint_is_read(pair, tmp_path, monkeypatch):
    """Two interrupts, of which the step that sees that it is ruined comes to know nothing."""
    update = Learner.update

    def hurried(self, *args):
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise NotFinite("the loss is not finite") from None
        return update(self, *args)

    monkeypatch.setattr(training, "load_weights", lambda *_: pytest.fail("a checkpoint is read"))
    assert main(command(pair, tmp_path, steps=1, checkpoint_every=1)) == 0
    monkeypatch.setattr(Learner, "update", hurried)
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=2"]) == 2
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["student_step"] == 1  # of the one that is there
