"""A micro-batch as verl's actor gets it, from models whose whole distributions are known."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import cmdp_fast.integrations.verl as integration
from cmdp_fast.integrations.verl.losses import actor_loss

FOLDER = integration.__path__[0]
PROMPTS, RESPONSES, VOCAB = (3, 1, 2, 3), (4, 5, 1, 3), 11


@cache
def example() -> Any:
    """The example configuration on verl's defaults."""
    with initialize_config_dir(FOLDER, version_base=None):
        return compose("cmdp")


def composed(*overrides: str) -> Any:
    """A copy of it with ``key=value`` or ``~key``, as on verl's command line (where composing takes a second each)."""
    config = deepcopy(example())
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("~"):
            section, _, name = key[1:].rpartition(".")
            with open_dict(config):
                del OmegaConf.select(config, section)[name]
        else:
            OmegaConf.update(config, key, yaml.safe_load(value), merge=False, force_add=True)
    return config


def parts(config: Any) -> tuple[Any, Any]:
    """(actor's, distillation's) configuration as verl's workers make them."""
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor), omega_conf_to_dataclass(config.distillation)


def loss_function(config: Any) -> partial[Any]:
    """What the actor's worker makes of verl's loss function."""
    actor, distillation = parts(config)
    return partial(actor_loss, partial(distillation_ppo_loss, config=actor, distillation_config=distillation))


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Batch:
    """Sequences of PROMPTS and RESPONSES tokens with the logits [S, V] of a student and a teacher for each."""

    def __init__(self, seed: int = 0, topk: int | None = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        self.tokens = [torch.randint(VOCAB, (size,), generator=generator) for size in self.lengths]
        self.student = [2 * torch.randn(size, VOCAB, generator=generator) for size in self.lengths]
        self.teacher = [2 * torch.randn(size, VOCAB, generator=generator) for size in self.lengths]
        self.advantages = [torch.randn(size, generator=generator) for size in RESPONSES]
        self.shift = [0.3 * torch.randn(size, generator=generator) for size in RESPONSES]
        self.topk = topk

    def response(self, rows: list[Tensor]) -> list[Tensor]:
        """Of values at all positions those that predict a response's tokens."""
        return [row[p - 1 : p - 1 + r] for row, p, r in zip(rows, PROMPTS, RESPONSES, strict=True)]

    def responses(self) -> list[Tensor]:
        return [row[p:] for row, p in zip(self.tokens, PROMPTS, strict=True)]

    def logprob(self, rows: list[Tensor]) -> list[Tensor]:
        """The log-probability of each response token, by logits."""
        return [
            logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            for logits, tokens in zip(self.response(rows), self.responses(), strict=True)
        ]

    def data(self, rows: list[int] | None = None, **settings: Any) -> TensorDict:
        """The micro-batch of some rows, as the agent loop and the trainer leave it."""
        rows = list(range(len(PROMPTS))) if rows is None else rows
        teacher = [logits.log_softmax(-1) for logits in self.teacher]
        if self.topk is None:  # the sampled token's, where the next token is known
            ids = [torch.cat([tokens[1:], tokens[:1]])[:, None] for tokens in self.tokens]
            values = [x.gather(-1, index) for x, index in zip(teacher, ids, strict=True)]
        else:
            values, ids = map(list, zip(*[x.topk(self.topk, -1) for x in teacher], strict=True))
        old = [x + s for x, s in zip(self.logprob(self.student), self.shift, strict=True)]
        columns = {
            "input_ids": self.tokens,
            "prompts": [row[:p] for row, p in zip(self.tokens, PROMPTS, strict=True)],
            "responses": self.responses(),
            "response_mask": [torch.ones(r, dtype=torch.long) for r in RESPONSES],
            "old_log_probs": old,
            "advantages": self.advantages,
            "teacher_logprobs": values,
            "teacher_ids": ids,
        }
        data = TensorDict({name: nested([column[i] for i in rows]) for name, column in columns.items()}, len(rows))
        tokens, sequences = sum(RESPONSES), len(PROMPTS)  # of the whole batch, as in verl
        of_the_engine = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": sequences}
        of_the_trainer = {
            "distillation_only": False,
            "distillation_use_topk": self.topk is not None,
            "calculate_entropy": False,
        }
        tu.assign_non_tensor(data, **(of_the_engine | of_the_trainer | settings))
        return data


def engine_outputs(batch: Batch, data: TensorDict, loss: Any, logits: list[Tensor]) -> dict[str, Tensor]:
    """What verl's FSDP engine makes of packed logits with a loss function, without the model and the process group."""
    engine = SimpleNamespace(
        engine_config=SimpleNamespace(entropy_checkpointing=False), _gather_and_unpad_packed=lambda x, pad_size: x
    )
    packed = torch.cat(logits)
    arguments = {
        "input_ids_rmpad_rolled": data["input_ids"].values().roll(-1),
        "temperature_rmpad": torch.ones(len(packed)),
        "temperature_is_one": True,
        "pad_size": 0,
    }
    return FSDPEngineWithLMHead.prepare_model_outputs(
        engine, SimpleNamespace(logits=packed[None]), arguments, data, logits_processor_func=loss
    )


def loss_of(
    batch: Batch, config: Any, logits: list[Tensor], rows: list[int] | None = None, **sent: Any
) -> tuple[Tensor, dict]:
    """verl's loss of a micro-batch, and its metrics; the trainer has ``sent`` settings along."""
    rows = list(range(len(PROMPTS))) if rows is None else rows
    loss = loss_function(config)
    data = batch.data(rows, **sent)
    outputs = engine_outputs(batch, data, loss, [logits[i] for i in rows])
    return loss(model_output=outputs, data=data)
