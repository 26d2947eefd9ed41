"""What a student is trained by, by the name that the setting `algorithm` has for it."""

from __future__ import annotations

from .gkd import GKD
from .minillm import MiniLLM
from .off_policy import OffPolicy
from .ppo import PPO

METHODS: dict[str, type[PPO]] = {"ppo": PPO, "gkd": GKD, "minillm": MiniLLM, "sft": OffPolicy, "kd": OffPolicy}
