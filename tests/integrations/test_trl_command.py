"""TRL's command line with our settings: the example, and what is said of settings that cannot work."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("trl", reason="needs the extra `trl`")

import yaml
from tiny_pair import PROBLEMS

import cmdp_fast.integrations.trl as package
from cmdp_fast.integrations.trl.__main__ import main, parse
from cmdp_fast.integrations.trl.version import AT_LEAST, BELOW, require_trl

EXAMPLE = Path(package.__file__).with_name("example.yaml")


@pytest.fixture
def tiny(pair, tmp_path, monkeypatch) -> list[str]:
    """What makes of the example a run of milliseconds, on a dataset of the test's own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (tmp_path / "my_rewards.py").write_text(
        "def digits(completions, **_):\n    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        *("--model_name_or_path", pair["student"], "--dataset_name", str(tmp_path / "data")),
        *("--reward_funcs", "my_rewards.digits", "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "2", "--max_completion_length", "6", "--gradient_accumulation_steps", "1"),
        *("--use_cpu", "--bf16", "false", "--disable_tqdm", "true"),
    ]


def test_the_example_trains_and_saves_a_student(tiny, pair, capsys):
    assert main(["--config", str(EXAMPLE), *tiny, "--teacher_model", pair["teacher"]]) == 0
    assert "cmdp/cumulative_kl" in capsys.readouterr().out
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path("out").iterdir()}


def test_the_command_stands_before_the_settings(tiny, pair, capsys):
    config = Path("mine.yaml")
    settings = {"budget": 4.0, "num_generations": 4, "teacher_model_name_or_path": pair["teacher"], "logging_steps": 1}
    config.write_text(yaml.safe_dump({**settings, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-5}))
    assert main(["distillation", "--config", str(config), *tiny, "--budget", "3"]) == 0
    assert "'cmdp/budget': '3'" in capsys.readouterr().out


def test_every_setting_of_the_example_is_one(pair):
    script, args, model, _ = parse("grpo", ["--config", str(EXAMPLE), "--use_cpu", "--bf16", "false"])
    given = yaml.safe_load(EXAMPLE.read_text())
    for name, value in given.items():
        holder = next(holder for holder in (args, script, model) if hasattr(holder, name))
        assert getattr(holder, name) in (value, [value], []), name  # report_to: none, is an empty list
    assert args.constraint.budget == 20.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "unknown command 'sft'; expected one of grpo, distillation"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "list.yaml"], "--config list.yaml: expected names and values, found a list"),
        (["--config", "broken.yaml"], "--config broken.yaml: not valid YAML: "),
        (["--config", "unknown.yaml"], "there is no setting named budgett"),
        (["--config", "wrong.yaml"], "budget must be a number, got list"),
        (["--budget", "much"], "argument --budget: invalid float value: 'much'"),
        (["--budget", "2", "--kind", "strict"], "argument --kind: invalid choice: 'strict'"),
        (["--budgett", "2"], "there is no setting named --budgett"),
        ([], "budget is missing"),
        (["--budget", "2"], "model_name_or_path is missing"),
        (["--budget", "2", "--model_name_or_path", "m"], "reward_funcs is missing"),
        (
            ["--budget", "2", "--model_name_or_path", "m", "--reward_funcs", "no_such.thing"],
            "No module named 'no_such'",
        ),
        (
            ["--budget", "2", "--model_name_or_path", "m", "--reward_funcs", "accuracy_reward"],
            "give exactly one of dataset_name and datasets",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_to_be_changed_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n")
    Path("broken.yaml").write_text("budget: [\n")
    Path("unknown.yaml").write_text("budgett: 2\n")
    Path("wrong.yaml").write_text("budget: [1]\n")
    fixed = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)] if arguments[-1:] != ["--config"] else []
    assert main([*arguments, *fixed]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cmdp_fast.integrations.trl: error: ")
    assert message in error


def test_models_and_data_that_are_not_there_are_said_in_one_line(tiny, pair, capsys):
    def said(*changes):
        assert main(["--budget", "2", "--num_generations", "4", *tiny, *changes]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "teacher_model is missing" in said()
    assert f"teacher_model {Path.cwd()}: no causal language model there" in said("--teacher_model", str(Path.cwd()))
    assert "no split 'test' in the dataset, only train" in said("--dataset_train_split", "test")
    Path("data/train.jsonl").write_text('{"question": "1+1="}\n')
    assert "needs a column 'prompt', it has question" in said()


def test_a_missing_or_untested_trl_is_named_with_what_to_install(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("cmdp_fast.integrations.packages.version", missing)
    with pytest.raises(ImportError, match=r"not installed, expected trl>=1.16,<1.17: pip install .*\[trl\]'$"):
        require_trl()
    for other in ("1.15.0", "1.17.0", "2.0.0"):
        monkeypatch.setattr("cmdp_fast.integrations.packages.version", lambda _, other=other: other)
        with pytest.raises(ImportError, match=f"trl {other} is installed, .*expected trl>=1.16,<1.17: pip install "):
            package.__getattr__("CMDPGRPOTrainer")  # the attribute may be there already, if the reference was built
        assert main(["--budget", "2"]) == 2
    monkeypatch.setattr("cmdp_fast.integrations.packages.version", lambda _: "1.16.3")
    require_trl()


def test_the_extra_asks_for_the_tested_releases():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"trl>={AT_LEAST},<{BELOW}" in extras["optional-dependencies"]["trl"]


def test_nothing_of_trl_is_imported_before_it_is_used():
    code = (
        "import sys, cmdp_fast, cmdp_fast.integrations.trl as p; dir(p)\n"
        "assert not {'trl', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainer'"):
        package.GRPOTrainer  # noqa: B018
