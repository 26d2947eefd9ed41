"""A step of the trainer, and its parts: the rollout, and scoring and update of given completions.

Student and teacher are Llamas with random weights. They have the hidden size and vocabulary of a shape, but four
layers. The rows of a shape are the tokens of its completions. The random numbers change neither memory nor time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from cmdp_fast import installation
from cmdp_fast.bench.case import Case, Op, Work, make_tokens, random
from cmdp_fast.bench.variant import Inputs, Values, Variant

LAYERS = 4
PROMPT = 16  # tokens
GROUP = 4  # completions per prompt
NEEDED = ("transformers", "accelerate", "tyro")


class TrainerStepOp(Op):
    name = "trainer_step"
    modes = ("rollout", "score and update", "step")
    shapes = ("smollm2",)
    axes = ("rows", "threads")

    def why_not(self, case: Case) -> str | None:
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            return f"needs {missing[0]}, which comes with the extra: {installation.extra('train')}"
        return None if case.dtype == "float32" else "the models of this case are float32"

    def work(self, case: Case) -> Work:
        return Work()

    def make(self, case: Case, seed: int) -> Inputs:
        shape, generator = case.shape, random(case, seed)
        return {
            "prompts": make_tokens(case, generator, shape.sequences // GROUP, PROMPT),
            "completions": make_tokens(case, generator, shape.sequences, shape.length),
        }

    def expected(self, case: Case, inputs: Inputs, names: Sequence[str], dtype: torch.dtype) -> Values:
        found = score_and_update(make_learner(case, "full", dtype), inputs)
        return {name: found[name] for name in names}

    def ours(self, case: Case) -> list[Variant]:
        if case.mode == "rollout":
            return [make_variant(case, "rollout", "tiled", roll_out)]
        if case.mode == "step":
            return [
                make_variant(case, f"step, logits={logits}", logits, whole_step, phases=_phases)
                for logits in ("tiled", "full")
            ]
        return [
            make_variant(case, f"score and update, logits={logits}", logits, score_and_update)
            for logits in ("tiled", "full")
        ]


def make_variant(
    case: Case, name: str, logits: str, function: Callable[[Any, Inputs], Any], **settings: Any
) -> Variant:
    """A variant that runs a function of a `Learner` and the inputs. The models are made once, with the first inputs."""
    made: list[Any] = []

    def prepare(inputs: Inputs) -> tuple[Any, Inputs]:
        if not made:
            made.append(make_learner(case, logits, case.torch_dtype))
        made[0].clock.seconds.clear()
        torch.manual_seed(0)  # every variant and round draws the same
        return made[0], inputs

    return Variant(name, lambda state: function(*state), prepare=prepare, **({"values": _values} | settings))


def _values(output: Any) -> Values:
    """The values that can be checked. A rollout is random and has none."""
    return output if isinstance(output, dict) else {}


def _phases(state: tuple[Any, Inputs]) -> dict[str, float]:
    return dict(state[0].clock.seconds)


def make_learner(case: Case, logits: str, dtype: torch.dtype) -> Any:
    """A `Learner` by PPO with random models of the case's sizes."""
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from cmdp_fast.trainer.experience import Collector
    from cmdp_fast.trainer.methods.ppo import PPO
    from cmdp_fast.trainer.records.clock import Clock
    from cmdp_fast.trainer.rollout import Sampling
    from cmdp_fast.trainer.settings.config import TrainConfig
    from cmdp_fast.trainer.step import Learner

    shape, accelerator = case.shape, Accelerator(cpu=case.device == "cpu")

    def model(seed: int, hidden: int) -> Any:
        torch.manual_seed(seed)
        heads = max(1, hidden // 64)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval().to(case.device, dtype)

    config = TrainConfig(
        logits=logits,  # type: ignore[arg-type]
        budget=1e-3,  # random models are close to each other: some completions are over budget
        epochs=1,
        num_generations=GROUP,
        max_new_tokens=shape.length,
        minibatch_size=shape.sequences,
        micro_batch_size=shape.sequences,
    )
    student, teacher = model(0, shape.hidden), model(1, shape.teacher_hidden).requires_grad_(False)
    collector = Collector(
        config,
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        tokenizer=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        sampling=Sampling(max_new_tokens=shape.length, temperature=1.0, eos=(0,), pad=0, vocab_size=shape.vocab),
        vocab_size=shape.vocab,
        rewards={"parity": _parity},
    )
    optimizer = accelerator.prepare(torch.optim.AdamW(student.parameters(), lr=1e-6))
    scheduler: Any = SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None)
    return Learner(PPO(collector, Clock(accelerator.device)), optimizer=optimizer, scheduler=scheduler)


def _parity(completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def roll_out(learner: Any, inputs: Inputs) -> Any:
    """Completions by the trainer's rollout; each completion of a group is sampled for itself."""
    from cmdp_fast.trainer.rollout import generate

    with torch.no_grad():
        return generate(learner.student, _repeated(inputs), learner.collector.sampling)


def score_and_update(learner: Any, inputs: Inputs) -> Values:
    """Scores the given completions and makes one update from them."""
    from cmdp_fast.trainer.experience import Completions
    from cmdp_fast.trainer.rollout import Rollout

    tokens, prompts = inputs["completions"], inputs["prompts"].repeat_interleave(GROUP, 0)
    whole = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    rollout = Rollout(prompts, torch.ones_like(prompts) > 0, tokens, torch.ones_like(tokens) > 0, whole)
    reward = torch.tensor(_parity(tokens.tolist()), device=tokens.device)
    constraint = learner.constraint()
    completions = Completions(rollout, [], reward, whole, reward > 0, named_rewards={}, failed={}, sound=None)
    experience = learner.collector.score(completions, learner.student, constraint, learner.clock, keep_outputs=True)
    metrics = learner.update(experience, learner.method.targets(experience, constraint), constraint)
    return {"reverse_kl": experience.stats.reverse_kl, "gradient norm": torch.tensor(metrics["grad_norm"])}


def whole_step(learner: Any, inputs: Inputs) -> Any:
    """Rollout, rewards, scoring, update."""
    prompts = inputs["prompts"].tolist()
    learner.step([{"prompt": ""} for _ in prompts], prompts)


def _repeated(inputs: Inputs) -> list[list[int]]:
    return [ids for ids in inputs["prompts"].tolist() for _ in range(GROUP)]
