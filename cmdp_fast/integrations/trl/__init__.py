"""TRL's trainers with a teacher and a budget of divergence (the extra ``trl``).

    from datasets import load_dataset
    from trl.rewards import accuracy_reward
    from cmdp_fast.integrations.trl import CMDPGRPOConfig, CMDPGRPOTrainer

    trainer = CMDPGRPOTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        teacher_model="Qwen/Qwen2.5-Math-7B",
        reward_funcs=accuracy_reward,
        args=CMDPGRPOConfig("out", budget=20.0, scale_rewards="none"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()

`CMDPGRPOTrainer` (grpo.py) is a `GRPOTrainer` whose advantages come from the modified reward and whose loss has the
direct term. `CMDPDistillationTrainer` (distillation.py) is a `DistillationTrainer` that logs exact divergences, and
takes reward functions and a budget. Everything else is TRL's: reward functions, datasets, callbacks, PEFT, trackers.
Logits of neither model are held: statistics are made of hidden states and heads a tile of the vocabulary at a time.

From the command line, with the settings in a YAML file (example.yaml lies beside this one)::

    python -m cmdp_fast.integrations.trl --config example.yaml
    python -m cmdp_fast.integrations.trl distillation --config mine.yaml

Nothing of TRL is imported before one of the four names is used. That raises ImportError if TRL is missing, or is a
release that this was not tested with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CMDPDistillationConfig, CMDPGRPOConfig
    from .distillation import CMDPDistillationTrainer
    from .grpo import CMDPGRPOTrainer

__all__ = ["CMDPDistillationConfig", "CMDPDistillationTrainer", "CMDPGRPOConfig", "CMDPGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .version import require_trl

    require_trl()
    from . import config, distillation, grpo

    return next(getattr(module, name) for module in (config, distillation, grpo) if hasattr(module, name))


def __dir__() -> list[str]:
    return sorted(__all__)
