"""What lies in the host's memory meanwhile: the optimizer's state, the teacher's layers and a part of its outputs."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_pair import learner_of, settings, untimed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.kept_outputs import KeptOutputs
from cmdp_fast.trainer.launch import check_sharding
from cmdp_fast.trainer.micro_batches import lengths_of, split
from cmdp_fast.trainer.models import offload, optimizer_bytes
from cmdp_fast.trainer.models.memory_estimate import estimate_memory
from cmdp_fast.trainer.models.offload import HostCopies, Offload, check_offload, layers_of, move_state
from cmdp_fast.trainer.models.split_rows import SplitRows
from cmdp_fast.trainer.optimization import check_optimizer, make_optimizer, moments
from cmdp_fast.trainer.records.checkpoint import load_checkpoint, save_checkpoint
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.rollout import Rollout


class Moves(TorchDispatchMode):
    """Counts bytes that are copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {("cuda", "cpu"): 0, ("cpu", "cuda"): 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.aten.copy_.default:
            way = args[1].device.type, args[0].device.type
        elif function is torch.ops.aten._to_copy.default:
            way = args[0].device.type, result.device.type
        else:
            return result
        if way[0] != way[1]:
            self.bytes[way] += result.nbytes
        return result


@pytest.mark.parametrize("here", [0, 1, 3, 7])
@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_split_rows_are_the_rows(here, at_once):
    whole = torch.randn(7, 3, 2)
    split = SplitRows(whole, 7, here)
    assert (len(split.here), len(split.elsewhere)) == (here, 7 - here)
    for rows in torch.arange(7).split(at_once):
        split[rows] = whole[rows]
    for index in ([6, 0, 3], [0], [6], [2, 2, 5], list(range(7)), []):
        index = torch.tensor(index, dtype=torch.long)
        assert torch.equal(split[index], whole[index])
    places = torch.tensor([[6, 1], [3, 0]])
    assert torch.equal(split[places], whole[places])
    values = torch.randn(3, 3, 2)
    split[torch.tensor([5, 0, 2])] = values
    assert torch.equal(split[torch.tensor([0, 2, 5])], values[[1, 2, 0]])
    assert torch.equal(split[torch.tensor([1, 3, 4, 6])], whole[[1, 3, 4, 6]])


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("spills", [False, True])
@pytest.mark.parametrize("room", [0, 1, 5, 9, 14])
def test_outputs_are_kept_as_far_as_there_is_room(room, spills, on_host):
    """Of whole completions; of the others they are computed again, or if they spill kept elsewhere."""
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    outputs, size = torch.randn(5, 4, 3), 3 * 4
    rollout = Rollout(torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1).bool(), mask.long(), mask, mask[:, -1])
    parts = split(range(5), lengths_of(rollout), count=2)  # [0, 4], [2, 3], [1]
    kept = KeptOutputs.with_room(parts, outputs[:2], room * size + 1, on_host=on_host, spills=spills)
    if room == 0 and not spills:
        assert kept is None
        return
    for part in parts:
        kept.keep(part.of(outputs), part)
    missing = {0: [], 1: [0, 2, 3, 4], 5: [2, 3, 4], 9: [2, 3], 14: []}[room] if not spills else []
    assert kept.missing == missing
    split_up = isinstance(kept.outputs, SplitRows)
    assert split_up == (on_host or (spills and room < 14))
    if split_up:
        assert len(kept.outputs.here) == (0 if on_host else room)
    for rows in ([4, 0, 2], [1], [3, 2], [0, 1, 2, 3, 4]):
        [part] = split(rows, lengths_of(rollout), count=5)
        asked = []

        def compute(some, part=part, asked=asked):
            asked.extend(some.mask.sum(1).tolist())
            wanted = [row for row in part.rows if row in missing]
            return outputs[wanted][:, : some.mask.shape[1]]

        found, some = kept.rows(part).completed(part.of_rollout(rollout), compute), part.of(mask)
        assert torch.equal(found[some], part.of(outputs)[some])
        assert sum(asked) == sum(int(mask[row].sum()) for row in rows if row in missing)


def teacher_calls(learner) -> list[int]:
    """How often the teacher is run in each update."""
    calls, update = [], learner.update

    def counted(*args):
        calls.append(0)
        hook = learner.teacher.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        metrics = update(*args)
        hook.remove()
        return metrics

    learner.update = counted
    return calls


@pytest.mark.parametrize("algorithm", ["ppo", "gkd", "minillm", "kd"])
def test_steps_are_the_same(algorithm, pair):
    """Bitwise, and the teacher is not run in the update, though none of its outputs fit on the device."""
    runs = []
    for away in (False, True):
        config = settings(
            pair,
            algorithm=algorithm,
            teacher_device="offload" if away else "",
            offload_optimizer=away,
            teacher_cache_mb=0,
        )
        learner, rows, prompts = learner_of(config)
        calls = teacher_calls(learner)
        metrics = [untimed(learner.step(rows, prompts)) for _ in range(2)]
        runs.append((metrics, calls, learner.student.state_dict()))
    (plain, recomputed, weights), (offloaded, none, same) = runs
    assert plain == offloaded
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert min(recomputed) > 0 and none == [0, 0]


@pytest.mark.parametrize("algorithm", ["ppo", "gkd"])
def test_with_any_room_the_step_is_the_same(algorithm, pair, monkeypatch):
    """And the less is kept, the more tokens the teacher reads again."""
    with_room, found = KeptOutputs.with_room, []
    for completions in (12, 7, 3, 0):
        learner, rows, prompts = learner_of(settings(pair, algorithm=algorithm, epochs=1, minibatch_size=12))

        def some(parts, like, most, learner=learner, completions=completions, **where):
            lengths = [length for part in parts for length in part.lengths.completions]
            return with_room(parts, like, sum(lengths[:completions]) * like[0, 0].nbytes, **where)

        monkeypatch.setattr(KeptOutputs, "with_room", some)
        read, outputs, update = [], learner.collector.outputs, learner.update

        def counted(model, rollout, learner=learner, read=read, outputs=outputs):
            read.append(int(rollout.mask.sum()) if model is learner.teacher else 0)
            return outputs(model, rollout)

        def counting(*given, learner=learner, update=update, counted=counted):
            learner.collector.outputs = counted
            return update(*given)

        learner.update = counting
        metrics = untimed(learner.step(rows, prompts))
        found.append((metrics, sum(read)))
    assert found[0][1] == 0 < found[1][1] < found[2][1] < found[3][1]
    for metrics, _ in found[1:]:
        assert metrics["grad_norm"] > 0.1
        for name, value in found[0][0].items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("tied", [False, True])
def test_layers_go_and_come_whole(tied, pair, monkeypatch):
    """With a clone in the place of a copy in another memory: the first one is freed, and made once."""
    config = AutoModelForCausalLM.from_pretrained(pair["teacher"]).config
    config.tie_word_embeddings = tied
    teacher = AutoModelForCausalLM.from_config(config)
    layers, head = layers_of(teacher), teacher.get_output_embeddings().weight
    held = [*teacher.parameters(), *teacher.buffers()]
    assert len(layers) == len(held) - 1 and not any(layer is head for layer in layers)
    expected = [layer.clone() for layer in layers]
    on_device = [weakref.ref(layer.untyped_storage()) for layer in layers]
    made = []
    monkeypatch.setattr(offload, "on_host", lambda tensor: made.append(tensor.shape) or tensor.clone())
    copies = HostCopies(layers)
    assert not made
    for _ in range(3):
        copies.leave()
        assert [storage() for storage in on_device] == [None] * len(layers)
        copies.bring()
        assert all(torch.equal(*both) for both in zip(expected, layers, strict=True))
    assert len(made) == len(layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_on_a_gpu(optim, pair):
    """The same steps as without, and everything where it belongs."""
    runs = []
    for away in (False, True):
        config = settings(
            pair, optim=optim, teacher_device="offload" if away else "", offload_optimizer=away, teacher_cache_mb=0
        )
        learner, rows, prompts = learner_of(config)
        runs.append([untimed(learner.step(rows, prompts)) for _ in range(2)])
    assert runs[0] == runs[1]
    states = [m for state in learner.optimizer.state.values() for m in moments(state).values()]
    assert {m.device.type for m in states} == {"cpu"} and all(m.is_pinned() for m in states)
    assert {p.device.type for p in learner.teacher.parameters()} == {"cuda"}
    with learner.offload.updating():
        states = [m for state in learner.optimizer.state.values() for m in moments(state).values()]
        assert {m.device.type for m in states} == {"cuda"}
        assert {p.device.type for p in layers_of(learner.teacher)} == {"cpu"}
        assert learner.teacher.get_output_embeddings().weight.device.type == "cuda"


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "rmsprop", "adagrad"])
def test_state_goes_and_comes(name, pair):
    config = settings(pair, optim=name, offload_optimizer=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = torch.nn.Parameter(torch.empty(5, 3, device="cuda"))
        optimizer = make_optimizer(config, [{"params": [parameter], "lr": 0.1}])
        parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        state = optimizer.state[parameter]
        size = sum(m.nbytes for m in moments(state).values())
        with Moves() as moves:
            move_state(optimizer, to_host=True)
            assert {m.device.type for m in moments(state).values()} <= {"cpu"}
            move_state(optimizer, to_host=True)  # which is there already
            move_state(optimizer, to_host=False)
            assert {m.device.type for m in moments(state).values()} <= {"cuda"}
        assert moves.bytes == {("cuda", "cpu"): size, ("cpu", "cuda"): size}
        optimizer.step()


def test_a_step_in_which_something_raises_leaves_the_teacher_whole(pair):
    learner, _, _ = learner_of(settings(pair, teacher_device="offload"))
    away = Offload(learner.config, learner.teacher, learner.optimizer)
    before = [p.clone() for p in learner.teacher.parameters()]
    with pytest.raises(InputError, match="stop"), away.updating():
        raise InputError("stop")
    assert all(torch.equal(a, b) for a, b in zip(before, learner.teacher.parameters(), strict=True))


def test_estimate(pair):
    config = settings(pair, teacher_cache_mb=0)
    learner, _, _ = learner_of(config)
    models = learner.student, learner.teacher
    plain = estimate_memory(config, *models, 4)
    away = estimate_memory(dataclasses.replace(config, teacher_device="offload", offload_optimizer=True), *models, 4)
    assert plain.rollout - away.rollout == plain.optimizer > 0
    head = learner.teacher.get_output_embeddings().weight.nbytes
    assert away.teacher_in_update == head < plain.teacher_in_update == plain.teacher_weights
    assert plain.update - away.update == plain.teacher_weights - head


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adam", "not in transformers' list"),
        ("lomo", "inside the backward pass"),
        ("galore_adamw", "list of modules"),
        ("schedule_free_adamw", "every evaluation"),
    ],
)
def test_optimizers_that_cannot_be_used(name, reason, pair):
    with pytest.raises(InputError, match=f"^--optim {name}.*{reason}") as raised:
        check_optimizer(settings(pair, optim=name))
    assert "\n" not in str(raised.value)


def test_a_package_that_is_missing_is_named(pair, monkeypatch):
    from transformers import trainer_optimizer

    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"^--optim paged_adamw_8bit: .*install.*bitsandbytes") as raised:
        check_optimizer(settings(pair, optim="paged_adamw_8bit"))
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="--offload-optimizer does not work with --optim paged_adamw_8bit"):
        check_offload(settings(pair, optim="paged_adamw_8bit", offload_optimizer=True))


def test_state_of_an_optimizer_that_takes_no_shapes(pair, monkeypatch):
    """Counted on a million numbers of a parameter instead."""
    config = settings(pair)
    parameters = [torch.nn.Parameter(torch.zeros(300, 7)), torch.nn.Parameter(torch.zeros(11))]
    expected = optimizer_bytes.optimizer_bytes(config, parameters, at_once=False).state

    def native(config, groups):
        if any(isinstance(p, FakeTensor) for group in groups for p in group["params"]):
            raise RuntimeError("needs an address")
        return make_optimizer(config, groups)

    monkeypatch.setattr(optimizer_bytes, "make_optimizer", native)
    found = optimizer_bytes.optimizer_bytes(config, parameters, at_once=False)
    assert found == (expected, 0) and expected == 2 * 4 * (2100 + 11)


def test_the_default_is_adamw_as_it_was(pair):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1}]
    optimizer = make_optimizer(settings(pair, weight_decay=0.3), groups)
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.3)
    assert type(optimizer) is torch.optim.AdamW
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in expected.param_groups
    ]


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd"])
def test_a_run_goes_on_from_a_checkpoint(name, pair, tmp_path):
    """With every optimizer, bitwise."""
    config = settings(pair, optim=name, offload_optimizer=True)
    learner, rows, prompts = learner_of(config)
    learner.step(rows, prompts)
    save_checkpoint(learner.accelerator, learner.trained, tmp_path, 1, {"ppo": learner.state_dict()})
    expected = untimed(learner.step(rows, prompts))
    again, rows, prompts = learner_of(config)
    state = load_checkpoint(again.accelerator, again.trained, tmp_path, Report())
    again.load_state_dict(state["ppo"])
    again.scheduler.step()
    assert untimed(again.step(rows, prompts)) == expected
    weights = again.student.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in learner.student.state_dict().items())


def test_the_update_alone_has_the_optimizer_and_lacks_the_teacher(pair, monkeypatch):
    config = settings(pair, teacher_device="offload", offload_optimizer=True, minibatch_size=12, micro_batch_size=12)
    learner, rows, prompts = learner_of(config)
    order = []
    for name, owner, attribute in (
        ("teacher leaves", HostCopies, "leave"),
        ("teacher comes", HostCopies, "bring"),
        ("rolls out", learner.collector, "complete"),
        ("scores", learner.collector, "score"),
        ("loss", learner.method, "loss"),
        ("descends", learner, "descend"),
    ):
        function = getattr(owner, attribute)
        monkeypatch.setattr(
            owner, attribute, lambda *a, _name=name, _f=function, **k: order.append(_name) or _f(*a, **k)
        )
    monkeypatch.setattr(
        offload, "move_state", lambda _, *, to_host: order.append("state leaves" if to_host else "state comes")
    )
    learner.step(rows, prompts)
    updates = ["loss", "descends"] * config.epochs
    away, back = ["teacher leaves", "state comes"], ["state leaves", "teacher comes"]
    assert order == ["rolls out", "scores", *away, *updates, *back]
    order.clear()
    learner.load_state_dict(learner.state_dict())  # of a checkpoint, whose optimizer is read to the device
    assert order == back


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"teacher_device": "offload"}, "--teacher-device offload"),
        ({"offload_optimizer": True}, "--offload-optimizer"),
        ({"teacher_quantization": "torchao-int8"}, "--teacher-quantization torchao-int8"),
        ({"optim": "adafactor"}, "--optim adafactor"),
    ],
)
def test_fsdp_refuses_what_it_cannot_do(changes, option, pair):
    plugin = SimpleNamespace(state_dict_type="FULL_STATE_DICT")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=True)
    check_sharding(accelerator, settings(pair))
    with pytest.raises(InputError, match=f"^{option} does not work with FSDP"):
        check_sharding(accelerator, settings(pair, **changes))
