"""Rewards that ask judges of other packages about hostile completions: they end nothing, run nothing, cost no hours."""

from __future__ import annotations

import json
import re

import pytest
from tiny_pair import learner_of, settings, tiny_model

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.judging import pool
from cmdp_fast.trainer.records.samples import samples_text
from cmdp_fast.trainer.tasks import rewards
from cmdp_fast.trainer.tasks.data import last_group
from cmdp_fast.trainer.tasks.step_verifiers import equations

EVERYTHING = re.compile("")
# Those of its judges that were seen to run a completion.
EVALUATING = (
    *("n_queens", "binary_matrix", "spiral_matrix", "string_insertion", "countdown", "puzzle24"),
    *("polynomial_multiplication", "simple_integration", "intermediate_integration"),
)


@pytest.fixture(scope="module")
def gym(isolation):
    """The reward `reasoning_gym` and problems of all its tasks."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    return rewards.reasoning_gym_judge(EVERYTHING, 10.0), reasoning_gym


def judged(reward, completions, entries):
    return reward(
        prompts=[""] * len(entries),
        completions=completions,
        answer=[entry["answer"] for entry in entries],
        metadata=[entry["metadata"] for entry in entries],
    )


def test_every_task_is_judged_as_it_judges_itself(gym):
    """Isolated or not, right, wrong, empty or no answer at all: the same score."""
    reward, reasoning_gym = gym
    entries, answers, expected = [], [], []
    for name in sorted(set(reasoning_gym.factory.DATASETS) - {"composite"}):
        task = reasoning_gym.create_dataset(name, size=1, seed=1)
        entry = task[0]
        for answer in (entry["answer"] or "", "wrong 17", ""):  # a task may have no answer of its own
            try:
                score = float(task.score_answer(answer, entry))
            except Exception:
                score = None
            entries.append(entry)
            answers.append(answer)
            expected.append(score)
    found = judged(reward, answers, entries)
    assert found == expected
    assert all(score == 1.0 for score, answer in zip(found, answers, strict=True) if answer not in ("", "wrong 17"))


@pytest.mark.parametrize("name", EVALUATING)
def test_a_completion_does_not_run_as_code(name, gym, tmp_path):
    """What made a file, ended the run or never returned."""
    reward, reasoning_gym = gym
    entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
    made = tmp_path / "made"
    hostile = [
        f"open({str(made)!r}, 'w')",
        f"[[open({str(made)!r}, 'w')]]",
        f"__import__('os').system('touch {made}')",
        f"[__import__('pathlib').Path({str(made)!r}).touch()]",
        "exit()",
        "__import__('os')._exit(0)",
    ]
    scores = judged(reward, [*hostile, entry["answer"]], [entry] * (len(hostile) + 1))
    assert not made.exists()
    assert scores[-1] == 1.0 and all(score is None or score < 0.1 for score in scores[:-1])
    assert [bool(failure) for failure in reward.failures] == [score is None for score in scores]
    assert reward.failures[5] == "ended with exit code 0"  # it did run, where it can do nothing


def test_metadata_of_somebody_else_chooses_no_judge_that_runs_code(gym, tmp_path):
    """A dataset's file names the task, and judges evaluate the file's own answer too."""
    reward, _ = gym
    made = tmp_path / "made"
    code = f"open({str(made)!r}, 'w')"
    entries = [
        {
            "answer": code,
            "metadata": {"source_dataset": "polynomial_multiplication", "result": "x", "variables": ["x"]},
        },
        {"answer": "1", "metadata": {"source_dataset": "no such task"}},
        {"answer": "1", "metadata": {}},
    ]
    assert judged(reward, ["x", "1", "1"], entries)[1:] == [None, None]
    assert not made.exists()


def test_training_goes_on(isolation, pair, tmp_path):
    """A whole run on completions that make a file and end the process: the file is not there, the run is whole."""
    pytest.importorskip("reasoning_gym")
    made = tmp_path / "made"
    alphabet = "".join(map(chr, range(33, 127)))
    student, teacher = (
        tiny_model(tmp_path / name, seed, alphabet=alphabet, positions=4096) for seed, name in ((1, "s"), (2, "t"))
    )
    texts = [
        f"[open({str(made)!r},'w')]",
        "getattr(__import__('os'),'_exit')(0)",
    ]  # without a full stop, the tokenizer's end
    (tmp_path / "hostile.py").write_text(
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({student!r})\n"
        f"TEXTS = {texts}\n"
        "def rollout(prompts, sampling, policy):\n"
        "    texts = [TEXTS[i % 2] for i in range(len(prompts))]\n"
        "    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]\n"
        "    return {'completion_ids': ids, 'logprobs': None}\n"
    )
    command = (
        f"train --recipe=pair --student={student} --teacher={teacher} --task=n_queens --task-size=20 --steps=2 "
        f"--rewards=reasoning_gym --max-new-tokens=150 --prompts-per-step=2 --num-generations=2 --eval-prompts=2 "
        f"--output-dir={tmp_path / 'runs'} --name=r --rollout={tmp_path / 'hostile.py'}:rollout"
    )
    assert main(command.split()) == 0
    assert not made.exists()
    lines = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rewards/reasoning_gym/failed" in line]
    assert [line["rewards/reasoning_gym/failed"] for line in steps] == [0.5, 0.5]
    assert [line["rewards/reasoning_gym/mean"] for line in steps] == [0.0, 0.0]
    result = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())
    assert result["student_after"]["unjudged"] == 0.5 and result["error"] is None


def test_refused_where_it_cannot_be_isolated(pair, tmp_path, monkeypatch, capsys):
    """Before any work is done, with what to do about it; `--unisolated-judges` does it all the same."""
    pytest.importorskip("reasoning_gym")
    real = pool.Connection

    def elsewhere(about, *arguments):
        if about["isolated"]:
            raise pool.IsolationError(f"cannot be isolated here, {arguments[-1]} runs it")
        return real(about, *arguments)

    monkeypatch.setattr(pool, "Connection", elsewhere)
    rows = tmp_path / "rows.jsonl"
    row = {"answer": "9", "metadata": {"source_dataset": "chain_sum"}}
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{9 - i}=", **row}) + "\n" for i in range(10)))
    task = {**pair, "dataset": str(rows), "rewards": ("reasoning_gym",)}
    with pytest.raises(InputError, match="--unisolated-judges runs it"):
        learner_of(settings(task))
    learner, problems, prompts = learner_of(settings(task, unisolated_judges=True))
    assert learner.step(problems, prompts)["rewards/reasoning_gym/failed"] == 0.0
    assert rewards.math_verify(EVERYTHING, 10.0)(completions=["$9$"], answer=["9"]) == [1.0]  # runs no code


def test_math_verify_is_given_up_in_time():
    """Numbers and patterns that took 5 s each, and a hundred of them ten minutes: they run side by side, and end."""
    pytest.importorskip("math_verify")
    reward = rewards.math_verify(EVERYTHING, 1.0)
    hostile = [
        "$9^{9^{9^{9}}}$",
        "$" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "$",
        "$" + "(" * 3000 + "$",
        r"$(10^{10})!$",
    ]
    scores = reward(completions=[*hostile, "$5$", "$6$"], answer=["5"] * (len(hostile) + 2))
    assert scores[-2:] == [1.0, 0.0] and not any(scores[:-2])
    assert reward.failures[0] == "no answer within 1 s"


def test_math_verify_has_its_time_where_it_cannot_be_isolated(monkeypatch):
    pytest.importorskip("math_verify")
    real = pool.Connection

    def elsewhere(about, *arguments):
        if about["isolated"]:
            raise pool.IsolationError("cannot be isolated here")
        return real(about, *arguments)

    monkeypatch.setattr(pool, "Connection", elsewhere)
    reward = rewards.math_verify(EVERYTHING, 1.0)
    assert reward(completions=["$9^{9^{9^{9}}}$", "$5$"], answer=["5", "5"])[1] == 1.0
    assert reward.failures == ["no answer within 1 s", ""]


def test_a_pattern_that_takes_forever_finds_nothing(caplog):
    assert last_group(re.compile(r"(-?\d+)(?!.*\d)"), "1" * 10_000 + " 1") is None  # with the cube of the length
    assert "takes more than" in caplog.text
    assert last_group(re.compile(r"(-?\d+)"), "1, then -2") == "-2"


@pytest.mark.parametrize(
    "number", ["9" * 400 + ".5", "9" * 5000, "1" + "," + "999," * 2000 + "999", " " * 10**6, "1 - (" * 50_000]
)
def test_equations_between_numbers_that_nothing_holds(number):
    assert equations("", f"{number} + 1 = 3") in (None, False)


def test_samples_hold_no_control_codes():
    sample = {"prompt": "p\n", "completion": "\x1b[2J\x9b0m\tok", "correct": True, "feasible": True, "cumulative": 1.0}
    text = samples_text([("student", [sample])])
    assert "p\n  |   ->  \ufffd[2J\ufffd0m\tok" in text


def test_a_completion_writes_no_sample_of_its_own():
    forged = "no\n2+2=  ->  4   [right, 1.00, within budget]\u202e\u2028"
    sample = {"prompt": "2+2=", "completion": forged, "correct": False, "feasible": True, "cumulative": 1.0}
    lines = samples_text([("student", [sample])]).splitlines()[2:]
    assert [line.startswith("  | ") for line in lines] == [False, True]
