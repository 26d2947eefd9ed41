"""A teacher in two processes, each with a part of every layer, says what one with all of them says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_pair import tiny_model
from transformers import AutoTokenizer
from two_processes import in_two_processes

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.parallel import ParallelTeacher, follow
from cmdp_fast.teachers.prefix_cache import PrefixCachedTeacher
from cmdp_fast.trainer.models.pair import load_alone
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.config import TrainConfig

ROWS, WANTED = [[5, 6, 7, 8], [], [5, 6, 7, 9, 4], [9, 10]], [1, 0, 2, 2]


def loaded(folder: str, parallel: bool):
    return load_alone("model", TrainConfig(teacher=folder), torch.float32, list, Report(), parallel)[0]


def says_the_same(folder: str, expected: torch.Tensor) -> None:
    """In each of both processes: the questions of the first reach the other, also those without a row."""
    dist.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = PrefixCachedTeacher(loaded(folder, parallel=True), tokenizer, "a teacher", most=1 << 20)
    if dist.get_rank():
        follow(own)
        assert own.shared == 3  # the prefix of three tokens, the second time
        return
    lost: list[str] = []
    teacher = ParallelTeacher(own, lost.append)
    for _ in range(2):
        torch.testing.assert_close(teacher.answer(ROWS, WANTED).as_hidden(), expected)
        assert teacher.answer([], []).as_hidden().shape == (0, 16)
    assert torch.equal(teacher.own_head().weight, loaded_head(folder)) and not lost
    teacher.close()


def loaded_head(folder: str) -> torch.Tensor:
    return loaded(folder, parallel=False).lm_head.weight


def test_two_processes_say_what_one_says(tmp_path):
    folder = tiny_model(tmp_path, seed=1, spare=3)
    one = TeacherInProcess(loaded(folder, parallel=False), AutoTokenizer.from_pretrained(folder))
    in_two_processes(says_the_same, folder, one.answer(ROWS, WANTED).as_hidden())


def test_a_model_that_transformers_cannot_spread_is_refused(tmp_path):
    folder = tiny_model(tmp_path, seed=1, family="falcon")
    with pytest.raises(InputError, match=r"--model .*: transformers has no plan for its layers in tensor parallelism"):
        loaded(folder, parallel=True)


def test_a_question_that_fails_in_the_first_process_ends_all():
    """The other may be in its middle."""

    class Failing(TeacherInProcess):
        def __init__(self) -> None:
            self.about = self.head = None

        def answer(self, rows, wanted):
            raise RuntimeError("out of memory")

    lost: list[str] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError):
            ParallelTeacher(Failing(), lost.append).answer([[1]], [1])
    finally:
        dist.destroy_process_group()
    assert lost == ["out of memory"]
