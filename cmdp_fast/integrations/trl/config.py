"""The settings beside TRL's own: the teacher, the budget, and the price of being over it.

Every value is checked when a configuration is made, before a model is loaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from trl import DistillationConfig, GRPOConfig

from cmdp_fast import checks
from cmdp_fast.constraint import Constraint, of_a_scaled_direct_term
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.ops.cost import FROM_STATISTICS
from cmdp_fast.pid import PIDController
from cmdp_fast.reference import KindName


@dataclass
class ConstraintOptions:
    """The settings of both configurations."""

    budget: float | None = field(
        default=None,
        metadata={
            "help": "The cumulative cost that a completion may have, in nats. `inf` measures the cost and does nothing "
            "about it."
        },
    )
    budget_per_token: bool = field(
        default=False,
        metadata={"help": "The budget is in nats per token of the completion, so that a long one may spend more."},
    )
    penalty: float = field(
        default=1.0,
        metadata={
            "help": "Paid for crossing the budget: once for `cmdp`, at each token from there on for `saute` and "
            "`worst_case`."
        },
    )
    discrepancy_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the excess cost, in the reward and in the direct term of the loss (`cmdp`, `hinge`)."
        },
    )
    teacher_cache_mb: int = field(
        default=512,
        metadata={
            "help": "The teacher's hidden states are kept from scoring to update if those of a generation batch fit "
            "in this, otherwise they are computed again."
        },
    )

    def check_amounts(self) -> None:
        """Raises InputError for numbers that cannot work."""
        if self.budget is not None:
            _checked(checks.number, "budget", self.budget)
            _require(self.budget >= 0, f"budget must be at least 0 nats, got {self.budget}")
        _checked(checks.number, "teacher_cache_mb", self.teacher_cache_mb)
        _require(self.teacher_cache_mb >= 0, f"teacher_cache_mb must be at least 0, got {self.teacher_cache_mb}")


@dataclass
class CMDPGRPOConfig(ConstraintOptions, GRPOConfig):
    """TRL's `GRPOConfig` with a teacher, a budget and a modified reward (docs of `cmdp_fast.modified_reward`).

    `budget` and a teacher (here or as the trainer's argument) are required; everything else has a default. The
    defaults of GRPO are left as they are, of which three matter here:

    ``scale_rewards="group"`` divides advantages by the standard deviation of their group, and the direct term by the
    same number. In a group of equal returns that is 1e-4, so the direct term is multiplied by 10,000, and where returns
    take two values the penalty's size is forgotten. ``"batch"`` divides both by the deviation of all returns at hand.
    ``"none"`` keeps the meaning of `penalty` and `discrepancy_weight`. Another value warns where the loss has a direct
    term: with the costs `reverse_kl` and `forward_kl`, and a finite budget or a price of every nat. The other costs
    have none, and their advantages are 0 in a group of equal returns.
    ``loss_type``: the objective is a sum over a completion's tokens, so the losses that divide every token by the same
    number keep to it: `dapo` (the default) and `dr_grpo`; `grpo` weighs a token by the length of its completion.
    ``beta`` is TRL's penalty towards the student's own beginning, and has nothing to do with the teacher;
    ``temperature`` divides the logits of student and teacher alike.

    Raises InputError, in one line, for values that cannot work; TRL's own refusals are a ValueError.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the teacher, or the name of one that is asked, such as "
            "`served:http://10.0.0.2:8765`. The trainer's argument of that name takes a model or a `Teacher`, too."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `from_pretrained` for a teacher given by its name, such as `dtype`. Without "
            "one the teacher keeps the dtype in which it is stored. For one that is asked those of `Asking`: `seconds` "
            "for an answer, `token_file`, and `dtype` of its hidden states on the wire."
        },
    )
    cost: Literal["reverse_kl", "forward_kl", "k1", "k3", "nll"] = field(
        default="reverse_kl",
        metadata={
            "help": "Cost of a token. The first two are exact divergences of the whole distribution with a direct "
            "gradient; the others are estimates from the sampled token."
        },
    )
    cost_clamp: float | None = field(
        default=None,
        metadata={"help": "The largest size in nats of a token's cost, for `k1`, `k3` and `nll`; without it none."},
    )
    kind: KindName = field(
        default="cmdp", metadata={"help": "The modified reward: the price of being over the budget."}
    )
    coefficient: float | None = field(
        default=None,
        metadata={
            "help": "The multiplier of `lagrangian`, that from which the controller of `pid` starts (0.001 if not "
            "given), the weight of `barrier`, or for `cmdp` and `hinge` the price of every nat, within the budget too "
            "(0 if not given); no other kind has one."
        },
    )
    pid_gains: list[float] = field(
        default_factory=lambda: [0.1, 0.01, 0.01],
        metadata={
            "help": "Proportional, integral and derivative gain of the controller of `pid`, which sets the multiplier "
            "by the completions at hand before their advantages are computed; per nat by which their mean cost exceeds "
            "their mean budget. Its state goes into the checkpoints."
        },
    )
    baseline: Literal["grpo", "position_rloo"] = field(
        default="grpo",
        metadata={
            "help": "The comparison that a token's advantage comes from. `grpo`: its completion's return with the "
            "group's mean, one number per completion. `position_rloo`: the return still to come with that of the "
            "group's other completions at the same position, a number per token, unscaled."
        },
    )

    def __post_init__(self) -> None:
        self.check_amounts()
        _require(self.budget is not None, "budget is missing: nats that a completion may spend (inf: no limit)")
        if self.kind == "pid":
            self._check_controller()
        _checked(checks.choice, "cost", self.cost, FROM_STATISTICS)
        _checked(lambda: self.constraint)
        _require(
            not (self.kind == "worst_case" and self.budget_per_token),
            "kind='worst_case' bounds a mean over tokens: leave budget_per_token out",
        )
        _require(
            self.baseline in ("grpo", "position_rloo"),
            f"baseline must be 'grpo' or 'position_rloo', got {self.baseline!r}",
        )
        _require(
            self.baseline == "grpo" or self.scale_rewards in ("none", False),
            f"baseline='position_rloo' is not scaled: it needs scale_rewards='none', got {self.scale_rewards!r}",
        )
        _require(
            self.multi_objective_aggregation == "sum_then_normalize",
            "a budget is weighed against one reward: multi_objective_aggregation must be 'sum_then_normalize', got "
            f"{self.multi_objective_aggregation!r}",
        )
        modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        _require(
            self.vllm_importance_sampling_mode in modes,
            f"vllm_importance_sampling_mode must be one of {', '.join(modes)}, got "
            f"{self.vllm_importance_sampling_mode!r}",
        )
        most = self.vllm_importance_sampling_clip_max
        _require(
            most is None or most >= 1.0,
            "vllm_importance_sampling_clip_max must be None or at least 1, the weight of what needs no correction, "
            f"got {most}",
        )
        super().__post_init__()
        self.constraint.warn_of_a_penalty_without_gradient(stacklevel=3)
        charged = self.budget != math.inf or self.constraint.price > 0
        if self.has_direct_term and self.scale_rewards != "none" and charged:
            whose = "the batch's" if self.scale_rewards == "batch" else "a group's"
            text = of_a_scaled_direct_term(f"scale_rewards={self.scale_rewards!r}", "scale_rewards='none'", whose)
            warnings.warn(text, stacklevel=3)

    def _check_controller(self) -> None:
        """Fills in the multiplier that the controller of ``pid`` starts from."""
        _require(self.budget != math.inf, "kind='pid' compares the mean cost with the budget: it must be finite")
        gains = self.pid_gains
        whole = isinstance(gains, (list, tuple)) and len(gains) == 3
        _require(whole, f"pid_gains must be three numbers, got {gains!r}")
        for gain in gains:
            _checked(checks.number, "pid_gains", gain)
            _require(math.isfinite(gain), f"pid_gains must be finite numbers, got {gains!r}")
        if self.coefficient is None:
            self.coefficient = PIDController.initial_integral

    @property
    def has_direct_term(self) -> bool:
        """Whether the loss may get a direct term: the controller of ``pid`` raises the multiplier from 0, too."""
        constraint = self.constraint
        return (replace(constraint, coefficient=1.0) if self.kind == "pid" else constraint).has_direct_term

    @property
    def constraint(self) -> Constraint:
        """The constraint that completions are held to."""
        assert self.budget is not None
        return Constraint(
            budget=self.budget,
            cost=self.cost,
            kind=self.kind,
            penalty=self.penalty,
            discrepancy_weight=self.discrepancy_weight,
            coefficient=self.coefficient,
            per_token=self.budget_per_token,
            cost_clamp=self.cost_clamp,
        )


@dataclass
class CMDPDistillationConfig(ConstraintOptions, DistillationConfig):
    """TRL's `DistillationConfig` with, if wanted, a budget and rewards.

    With neither, the loss is TRL's. `beta` says which divergence is the loss and, with a budget, the cost: 0 is forward
    KL, 1 reverse KL, between them a Jensen-Shannon divergence.

    Raises InputError, in one line, for values that cannot work; TRL's own refusals are a ValueError.
    """

    kind: Literal["cmdp", "hinge"] = field(
        default="cmdp",
        metadata={
            "help": "The price of being over the budget: `cmdp` loses the task's reward from there on and pays the "
            "penalty, `hinge` keeps the reward. Both pay for the excess."
        },
    )
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Completions per prompt, which are compared with one another: at least 2 with rewards or a budget."
        },
    )

    def __post_init__(self) -> None:
        self.check_amounts()
        _require(self.kind in ("cmdp", "hinge"), f"kind must be 'cmdp' or 'hinge', got {self.kind!r}")
        _checked(checks.number, "num_generations", self.num_generations)
        _require(self.num_generations >= 1, f"num_generations must be at least 1, got {self.num_generations}")
        _require(
            self.budget is None or self.num_generations >= 2,
            f"a budget needs completions to compare: num_generations must be at least 2, got {self.num_generations}",
        )
        super().__post_init__()
        _checked(lambda: self._held_to(0.0 if self.budget is None else self.budget))
        size = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        _require(
            size % self.num_generations == 0,
            f"num_generations={self.num_generations} must divide the {size} completions of an optimizer step",
        )

    @property
    def constraint(self) -> Constraint | None:
        """The constraint that completions are held to, if there is a budget; its cost is the loss's divergence."""
        return None if self.budget is None else self._held_to(self.budget)

    def _held_to(self, budget: float) -> Constraint:
        return Constraint(
            budget=budget,
            cost="jsd",
            beta=self.beta,
            kind=self.kind,
            penalty=self.penalty,
            discrepancy_weight=self.discrepancy_weight,
            per_token=self.budget_per_token,
        )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


def _checked(check: Callable[..., object], *arguments: Any) -> None:
    """Runs one of the operations' own checks; its complaint is of the user's settings."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as error:
        raise InputError(first_line(error)) from error
