"""Several teachers, by a column of the problems: each completion's cost, budget and gradient come from its own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_asked_teacher import OF_ASKING, metrics, served
from tiny_pair import PROBLEMS, arguments, learner_of, settings, tiny_model, untimed
from two_processes import in_two_processes, same_steps, take_steps

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.experience import Completions
from cmdp_fast.trainer.micro_batches import MicroBatch, lengths_of
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.settings.several import with_one_teacher
from cmdp_fast.unmasked import Lengths

ROUTED = {"teacher_column": "subject"}


@pytest.fixture(scope="module")
def servers(pair, tmp_path_factory):
    """Two servers, whose models differ in width."""
    wide = tiny_model(tmp_path_factory.mktemp("wide"), seed=4, width=32)
    servers = {"math": served(pair["teacher"]), "code": served(wide)}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture
def routed(pair, servers, tmp_path):
    """The settings of a run with both; every third problem is of code."""
    file = tmp_path / "problems.jsonl"
    rows = [{**row, "subject": "math" if i % 3 else "code"} for i, row in enumerate(PROBLEMS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = ",".join(f"{name}=served:{server.url}" for name, server in servers.items())
    return {**pair, "dataset": str(file), "teacher": f"routed:{teachers}"}


def of_teacher(experience, number: int) -> MicroBatch:
    rows = (experience.rollout.teacher_index == number).nonzero()[:, 0].tolist()
    lengths = lengths_of(experience.rollout)
    return MicroBatch(rows, Lengths(*([each[row] for row in rows] for each in lengths)))


def mixed(config):
    """`learner_of`, with problems of both subjects."""
    learner, rows, prompts = learner_of(config)
    assert {row.get("subject") for row in rows} == {"math", "code"}
    return learner, rows, prompts


@pytest.mark.parametrize("changes", [{}, {"cost": "jsd", "teacher_temperature": 1.3}], ids=["reverse_kl", "jsd"])
def test_the_account_is_that_of_each_teacher_alone(changes, servers, routed):
    """Of the same completions, to the last digit: statistics, costs, violations and modified rewards."""
    budgets = {"math": 1.5, "code": 3.0}
    config = settings(routed, **ROUTED, **changes, teacher_budgets=tuple(f"{n}={b}" for n, b in budgets.items()))
    learner, rows, prompts = mixed(config)
    every = [row for row in rows for _ in range(4)], [ids for ids in prompts for _ in range(4)]
    collected = learner.method.collect(*every, learner.constraint())
    for number, (name, server) in enumerate(servers.items()):
        part = of_teacher(collected, number)
        mine = collected.rows(part)
        alone = settings({**routed, "teacher": f"served:{server.url}"}, **changes, budget=budgets[name])
        other = learner_of(alone)[0]
        rollout = replace(mine.rollout, teacher_index=None)
        given = {f: getattr(mine, f) for f in ("texts", "task_reward", "scored", "correct", "named_rewards", "failed")}
        completions = Completions(rollout=rollout, sound=None, **given)
        expected = other.collector.score(completions, learner.student, other.constraint(), Clock())
        for ours, theirs in zip(
            (*mine.stats, *mine.trace, mine.reward), (*expected.stats, *expected.trace, expected.reward), strict=True
        ):
            if ours.dim() == 1:  # first_violation: the width of the whole batch where there is none
                ours = ours.clamp(max=theirs.new_tensor(mine.rollout.mask.shape[1]))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cache", [512, 0])
@pytest.mark.parametrize("changes", [{}, {"algorithm": "gkd", "jsd_beta": 0.3}, {"micro_batch_tokens": 40}], ids=str)
def test_two_names_of_one_teacher_change_nothing(pair, servers, routed, cache, changes):
    """But the order of the sums, since micro-batches are divided by teacher."""
    url = servers["math"].url
    runs = []
    for teacher, more in ((f"served:{url}", {}), (f"routed:math=served:{url},code=served:{url}", ROUTED)):
        config = settings({**routed, "teacher": teacher}, **more, **changes, teacher_cache_mb=cache)
        learner, rows, prompts = mixed(config)
        runs.append([untimed(learner.step(rows, prompts)) for _ in range(2)])
    for one, two in zip(*runs, strict=True):
        for name, value in one.items():
            if name not in OF_ASKING:
                assert two[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
        assert {"teacher/math/cumulative_kl", "teacher/code/constraint_satisfaction"} <= two.keys()


def test_a_folder_may_be_among_them(pair, routed):
    """It is loaded, and says what it says on a server."""
    place = routed["teacher"].partition(",")[2]
    steps, digests = [], []
    for teacher in (routed["teacher"], f"routed:math={pair['teacher']},{place}"):
        learner, rows, prompts = mixed(settings({**routed, "teacher": teacher}, **ROUTED))
        steps.append({n: v for n, v in untimed(learner.step(rows, prompts)).items() if n not in OF_ASKING})
        digests.append({each.about.revision for each in learner.teacher.each()})
    assert steps[0] == steps[1] and digests[0] == digests[1]


@pytest.mark.parametrize("changes", [{}, {"baseline": "gae"}], ids=str)
def test_hidden_states_of_two_widths_are_kept_together(routed, changes):
    """A step is the same whether those of both teachers are kept or none."""
    steps = []
    for size in (512, 0):
        learner, rows, prompts = mixed(settings(routed, **ROUTED, **changes, teacher_cache_mb=size))
        steps.append({n: v for n, v in untimed(learner.step(rows, prompts)).items() if n not in OF_ASKING})
    assert steps[0] == steps[1]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is needed")
def test_the_steps_of_two_processes_are_those_of_one(routed):
    """Each asks for itself; one may have completions of more teachers than the other."""
    changes = {**ROUTED, "teacher_budgets": ("code=3.0",), "micro_batch_size": 2}
    in_two_processes(same_steps, [(routed, changes, take_steps(routed, changes))])


def test_each_teacher_has_its_budget_in_the_metrics(routed):
    learner, rows, prompts = mixed(settings(routed, **ROUTED, teacher_budgets=("code=4.5",), budget=1.5))
    step = learner.step(rows, prompts)
    share = sum(row["subject"] == "code" for row in rows) / len(rows)
    assert (step["teacher/math/budget"], step["teacher/code/budget"]) == (1.5, 4.5)
    assert step["cmdp/budget"] == pytest.approx(share * 4.5 + (1 - share) * 1.5)
    for name in ("constraint_satisfaction", "mean_cumulative", "cumulative_kl"):
        parts = step[f"teacher/math/{name}"], step[f"teacher/code/{name}"]
        assert step[f"cmdp/{name}"] == pytest.approx((1 - share) * parts[0] + share * parts[1], rel=1e-5)


def test_a_run_goes_on_with_the_same_teachers(routed, servers, tmp_path, capsys):
    """Named again, as the places of one are; and in the order and under the names of the beginning."""
    options = {"teacher_column": "subject", "checkpoint_every": 1, "eval_every": 0, "lr_schedule": "constant"}
    assert main(arguments(routed, tmp_path, **options, steps=3, name="whole")) == 0
    assert main(arguments(routed, tmp_path, **options)) == 0
    resume = ["train", f"--resume={tmp_path / 'r'}", "--steps=3"]
    assert main(resume) == 2
    assert "--teacher=routed:" in capsys.readouterr().err
    turned = "routed:" + ",".join(
        f"{n}=served:{s.url}" for n, s in zip(servers, reversed(servers.values()), strict=True)
    )
    assert main([*resume, f"--teacher={turned}"]) == 2
    assert "not what the run began with" in capsys.readouterr().err
    assert main([*resume, f"--teacher={routed['teacher']}"]) == 0
    for whole, resumed in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "r"), strict=True):
        assert whole["loss"] == resumed["loss"] and "teacher/math/mean_cumulative" in whole
    evaluate = ["evaluate", f"--resume={tmp_path / 'r'}", f"--json={tmp_path / 'e.json'}"]
    assert main([*evaluate, f"--teacher={routed['teacher']}"]) == 0
    assert main([*arguments(routed, tmp_path, **options, name="dry"), "--dry-run"]) == 0


def test_a_problem_that_names_no_teacher_is_refused_before_a_model_is_read(routed, tmp_path, capsys):
    def said(**changes):
        assert main(arguments({**routed, "student": "nowhere"}, tmp_path, **changes)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "has no such column; the teachers are math, code" in said(teacher_column="topic")
    assert "has '9' there" in said(teacher_column="answer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_column": ""}, "needs the column that names the teacher"),
        ({"logits": "full"}, "needs --logits tiled"),
        ({"teacher": "routed:math"}, "expected NAME=TEACHER,NAME=TEACHER"),
        ({"teacher_budgets": ("physics=2.0",)}, "--teacher-budgets physics=2.0: expected NAME=NATS"),
        ({"teacher_budgets": ("math=0",)}, "--teacher-budgets math=0: expected"),
        ({"teacher_budgets": ("math=1", "math=2")}, "--teacher-budgets math=2: expected"),
        ({"teacher_budgets": ("math=1",), "kind": "pid"}, "--kind pid has one budget"),
        ({"teacher_budgets": ("math=1",), "budget_start": 1.0, "budget_steps": 2}, "go with no --budget-steps"),
        ({"algorithm": "sft"}, "cannot be sampled"),
        ({"teacher": "served:http://127.0.0.1:1"}, "--teacher-column is for several teachers"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_several_teachers(changes, message, pair):
    base = {"teacher_column": "subject", **changes}
    teacher = base.pop("teacher", "routed:math=served:http://127.0.0.1:1,code=served:http://127.0.0.1:2")
    with pytest.raises(InputError, match=message):
        settings({**pair, "teacher": teacher}, **base)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--teacher", "math=served:http://a:1", "code=Q/c", "--steps", "2"],
            ["--teacher", "routed:math=served:http://a:1,code=Q/c", "--steps", "2"],
        ),
        (["--teacher=math=a", "code=b"], ["--teacher", "routed:math=a,code=b"]),
        (["--teacher", "Q/w=x", "--task", "a=b"], ["--teacher", "Q/w=x", "--task", "a=b"]),
        (["--teacher=served:http://a:1?x=2", "b=c"], ["--teacher=served:http://a:1?x=2", "b=c"]),
        (["--teacher-column", "a=b", "--teacher", "folder"], ["--teacher-column", "a=b", "--teacher", "folder"]),
        (["--teacher"], ["--teacher"]),
    ],
)
def test_several_teachers_are_written_one_after_another(words, expected):
    assert with_one_teacher(words) == expected
