"""The problems of exact.py as something for the trainer to sample: a language model that is a table, and its training.

A `Table` is a causal language model whose hidden state is the table's row for the history, which are the logits
already, and whose head is the identity. Its tokens are the actions; one number more, which has no column in the head
and is therefore never drawn, starts every prompt and stands for padding and for the end of a sequence. So an episode
has exactly as many tokens as the problem has steps, and a token's divergence is that of two rows of the tables.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from exact import Problem, Setting, vectors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from cmdp_fast.trainer.material import Material
from cmdp_fast.trainer.run import make_learner
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.step import Learner


class TableConfig(PreTrainedConfig):
    """``next_state[s][a]`` is the state that follows; the end of an episode leads to the first state again."""

    model_type = "table"

    def __init__(self, next_state: list[list[int]] | None = None, **others: Any) -> None:
        self.next_state = next_state or [[0]]
        self.hidden_size = len(self.next_state[0])
        self.vocab_size = self.hidden_size + 1
        self.num_hidden_layers = 0
        start = self.vocab_size - 1
        super().__init__(**{"bos_token_id": start, "eos_token_id": start, "pad_token_id": start} | others)


class Table(PreTrainedModel, GenerationMixin):
    """Logits [S, V] of the next action in each state."""

    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        actions = config.hidden_size
        self.register_buffer("next_state", torch.tensor(config.next_state), persistent=False)
        self.rows = nn.Embedding(len(config.next_state), actions)
        self.head = nn.Linear(actions, actions, bias=False).requires_grad_(False)
        self.post_init()

    @property
    def logits(self) -> Tensor:
        """The table, [S, V] in float64, detached."""
        return self.rows.weight.detach().double()

    def get_input_embeddings(self) -> None:
        """None: the rows are those of states, not of tokens."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}  # all of them: there is no cache that knows the others

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: Any) -> CausalLMOutputWithPast:
        """Logits [B, L, V], or of the last ``logits_to_keep`` positions."""
        state = torch.zeros_like(input_ids[:, 0])
        states = []
        for token in input_ids.unbind(1):
            starts = token == self.config.vocab_size - 1
            state = torch.where(starts, 0, self.next_state[state, torch.where(starts, 0, token)])
            states.append(state)
        return CausalLMOutputWithPast(logits=self.head(self.rows(torch.stack(states, 1)[:, -logits_to_keep:])))


def table(problem: Problem, logits: Tensor) -> Table:
    """The policy with these logits [S, V]."""
    next_state = torch.zeros(problem.teacher.shape, dtype=torch.long)
    next_state[problem.state[:, :-1], problem.tokens[:, :-1]] = problem.state[:, 1:]
    model = Table(TableConfig(next_state.tolist()))
    with torch.no_grad():
        model.rows.weight.copy_(logits)
        model.head.weight.copy_(torch.eye(logits.shape[1]))
    return model.eval()


def collapsed(problem: Problem) -> Tensor:
    """Logits of a policy that nearly always takes what pays most, and is over budget at its first token."""
    value = problem.reward.new_full(problem.teacher.shape, -torch.inf)
    for state, token, reward in zip(problem.state, problem.tokens, problem.reward.sum(1), strict=True):
        value[state, token] = torch.maximum(value[state, token], reward)  # the best of the paths through it
    return 4.0 * nn.functional.one_hot(value.argmax(1), problem.teacher.shape[1]).double()


def methods(name: str) -> dict[str, Setting]:
    """What the trainer is to do about the budget of the ``tree`` or the ``bandit``, by name."""
    data = vectors(name)
    if name == "tree":
        budget, price, penalty, weight = data["budget"], data["expected_budget"]["lambda"], 0.5, 3.0
    else:
        optimum = data["reverse_kl"][1]
        budget, price, penalty, weight = optimum["budget"], optimum["lambda"], 1.0, 1.0
    return {
        "cmdp": Setting("cmdp", budget, penalty=penalty, weight=weight),
        "hinge": Setting("hinge", budget, weight=weight),
        "barrier": Setting("barrier", budget, coefficient=0.005),
        "lagrangian": Setting("lagrangian", budget, coefficient=price),
        "pid": Setting("pid", budget, coefficient=0.1),
        "saute": Setting("saute", budget),
        "grpo": Setting("lagrangian", budget, coefficient=0.0),
    }


def settings(setting: Setting, **changes: Any) -> TrainConfig:
    """The trainer's configuration of a setting of exact.py: a step samples one group of completions.

    The learning rate falls to 0 in a straight line, so that the policy comes to rest at a budget across which it would
    hop to and fro. The multiplier of pid has to come to rest with it.
    """
    worst_case = setting.kind == "worst_case"
    base = TrainConfig(
        student="table",
        teacher="table",
        task="table",
        kind=setting.kind,
        cost=setting.cost,
        budget=setting.budget,
        prefix_budget=setting.budget if worst_case else 0.0,
        penalty=setting.penalty,
        discrepancy_weight=setting.weight,
        coefficient=setting.coefficient or 0.0,
        reward_unit="one",  # that of the exact optimum
        budget_price=0.0,
        pid_gains=(1.0, 0.1, 0.0),  # costs are tenths of a nat, so the gains exceed the defaults by far
        steps=100,
        prompts_per_step=1,
        num_generations=1024,
        epochs=2,
        baseline="position_rloo",
        learning_rate=0.03,
        lr_schedule="linear",
    )
    config = dataclasses.replace(base, **changes)
    half = config.num_generations // 2  # two optimizer steps an epoch: the ratio leaves 1
    config = dataclasses.replace(config, minibatch_size=half, micro_batch_size=config.num_generations)
    config.validate()
    return config


def learner_of(problem: Problem, config: TrainConfig, start: Tensor | None = None) -> Learner:
    """The trainer with a student that starts from these logits (None: the teacher's)."""
    steps, actions = problem.tokens.shape[1], problem.teacher.shape[1]
    rewards = dict(zip(map(tuple, problem.tokens.tolist()), problem.reward.sum(1).tolist(), strict=True))

    def path_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [rewards[tuple(ids)] for ids in completion_ids]

    names = {str(action): action for action in range(actions)} | {"<start>": actions}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="<start>")), eos_token="<start>", pad_token="<start>"
    )
    teacher = problem.teacher.log()
    material = Material(
        student=table(problem, teacher if start is None else start),
        teacher=table(problem, teacher).requires_grad_(False),
        tokenizer=tokenizer,
        rewards={"path": path_reward},
    )
    return make_learner(dataclasses.replace(config, max_new_tokens=steps), Accelerator(), material)


def step(learner: Learner) -> dict[str, float]:
    """One step of the trainer; its metrics."""
    return learner.step([{"prompt": "<start>"}], [[learner.student.config.bos_token_id]])


def train(problem: Problem, config: TrainConfig, start: Tensor | None = None) -> Tensor:
    """Trains as the configuration says; the logits [S, V] that it ends with, in float64."""
    learner = learner_of(problem, config, start)
    for _ in range(config.steps):
        step(learner)
    return learner.student.logits
