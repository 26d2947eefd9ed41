"""Settings of accelerate that would make a step another than the trainer's settings say."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, DynamoBackend
from tiny_pair import arguments

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.launch import check_training


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """What accelerate has read from the environment would stay in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps is 4"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "dynamo_backend is inductor"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed"),
        ("ACCELERATE_USE_FSDP", "true", "asks for fsdp, and this would be one process"),
        ("CMDP_FAST_PATIENCE", "soon", "cmdp_fast_patience is 'soon', expected how many seconds"),
    ],
)
def test_the_environment_is_looked_at_before_any_work(name, value, expected, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert main(arguments(pair, tmp_path / "runs")) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and error.count("\n") == 1
    assert expected in error.lower()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_is_wrong_before_processes_meet_is_said_on_each_machine(rank, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")  # on the second machine
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(arguments(pair, tmp_path, budget=-1)) == 2
    assert capsys.readouterr().err.count("--budget") == (rank == "0")


def accelerator(**changes) -> SimpleNamespace:
    """The part of an accelerator that is looked at, as of a single process."""
    plain = {
        "distributed_type": DistributedType.NO,
        "num_processes": 2,
        "gradient_accumulation_steps": 1,
        "parallelism_config": None,
        "state": SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, "distributed_type is DEEPSPEED"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "distributed_type is MEGATRON_LM"),
        ({"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1)}, "tp_size is 2, expected 1"),
        ({"parallelism_config": SimpleNamespace(cp_size=4)}, "cp_size is 4, expected 1"),
    ],
)
def test_ways_to_spread_that_the_step_does_not_know(changes, expected):
    with pytest.raises(InputError, match=expected):
        check_training(accelerator(**changes))


def test_ddp_in_place_of_the_sharding_that_was_asked_for(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="asks for FSDP, and this would be 2 processes with DDP"):
        check_training(accelerator(distributed_type=DistributedType.MULTI_CPU))


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP])
def test_ways_to_spread_that_it_knows(kind):
    check_training(accelerator(distributed_type=kind, parallelism_config=SimpleNamespace(tp_size=1, dp_shard_size=8)))
