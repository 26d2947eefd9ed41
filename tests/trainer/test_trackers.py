"""Trackers of a run that goes on: wandb by the id that the run's folder keeps, trackio by its name."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
from accelerate import Accelerator
from tiny_pair import settings

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.records.metrics_log import TRACKERS, MetricsLog

STUB = """
begun, logged, config = [], [], {}
class Run:
    def log(self, values, step=None):
        logged.append((step, values))
    def finish(self):
        pass
def init(**options):
    begun.append(options)
    return Run()
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Packages of these names that keep what they are asked for."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    found = {}
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(STUB)
        monkeypatch.delitem(sys.modules, name, raising=False)
        found[name] = importlib.import_module(name)
    yield found
    for name in found:
        sys.modules.pop(name, None)


def begun(folder, pair, steps=()):
    MetricsLog(folder, Accelerator(), settings(pair, trackers=("wandb", "trackio")), steps).close()


def test_tensorboard_has_the_samples_as_they_are(pair, tmp_path):
    """As Markdown's code, in which nothing is markup."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, Accelerator(), settings(pair, trackers=("tensorboard",)))
    sample = {"prompt": "1+1=", "completion": "<b>*2*</b>\n# x", "correct": None}
    log.evaluation(3, {"accuracy": 0.5}, [sample])
    log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    (event,) = read.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3 and "after 3 steps" in text and "<b>*2*</b>" in text
    assert all(line.startswith("    ") for line in text.splitlines() if line)


def test_a_run_that_goes_on_is_the_same_run(pair, stubs, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        begun(folder, pair)
    begun(run, pair, steps=[{"step": 1, "reward": 1.0}])
    first, others, again = stubs["wandb"].begun
    assert re.fullmatch("[0-9a-f]{16}", first["id"]) and first["id"] == again["id"] != others["id"]
    assert first["resume"] == again["resume"] == "allow" and first["name"] == "run"
    assert ["resume" in options for options in stubs["trackio"].begun] == [False, False, True]
    assert stubs["trackio"].begun[2]["resume"] == "allow"


def test_an_id_of_the_environment_is_taken_and_kept(pair, stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-1")
    begun(tmp_path, pair)
    monkeypatch.delenv("WANDB_RUN_ID")
    begun(tmp_path, pair, steps=[{"step": 1}])
    assert [options["id"] for options in stubs["wandb"].begun] == ["sweep-1", "sweep-1"]


def test_a_run_that_begins_again_is_another(pair, stubs, tmp_path):
    begun(tmp_path, pair)
    begun(tmp_path, pair)
    first, again = stubs["wandb"].begun
    assert first["id"] != again["id"]


def test_a_run_of_an_earlier_version_gets_an_id(pair, stubs, tmp_path):
    steps = [{"step": 1, "reward": 1.0}]  # without the figures of later versions
    for _ in range(2):
        begun(tmp_path, pair, steps)
    first, again = stubs["wandb"].begun
    assert first["id"] == again["id"]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == steps


@pytest.mark.parametrize("content", ["{", '{"wandb": "../../else"}', '{"wandb": 3}'])
def test_a_damaged_id_is_named(content, pair, stubs, tmp_path):
    (tmp_path / TRACKERS).write_text(content)
    with pytest.raises(InputError, match=rf"{TRACKERS} .*without that file wandb gets a new run"):
        begun(tmp_path, pair, steps=[{"step": 1}])
    assert not stubs["wandb"].begun


def test_an_id_of_another_form_is_refused(pair, stubs, tmp_path):
    from cmdp_fast.digest import write_sealed

    write_sealed(tmp_path / TRACKERS, {"wandb": "../../else"})
    with pytest.raises(InputError, match="holds no id of wandb's"):
        begun(tmp_path, pair, steps=[{"step": 1}])
