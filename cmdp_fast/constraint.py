"""What a completion may spend and what it pays for more: one value that every operation and every trainer takes.

    cf.Constraint(budget=2.0)                                      # the method: kind="cmdp", cost="reverse_kl"
    cf.Constraint(budget=2.0, kind="lagrangian", coefficient=0.1)  # a soft relaxation

`KINDS` is the one table of what a kind of modified reward is; everything else about a kind is derived from it. A
function of your own that takes one of the names says ``kind: KindName``; so do `CostName`, `PenaltyAt`, `Reduction` and
`Edge`, and a type checker finds a typo in each of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from cmdp_fast import checks
from cmdp_fast.layout import BudgetRule, RewardRule
from cmdp_fast.reference import COSTS, DIFFERENTIABLE_COSTS
from cmdp_fast.reference import CostName as CostName
from cmdp_fast.reference import Edge as Edge
from cmdp_fast.reference import KindName as KindName
from cmdp_fast.reference import PenaltyAt as PenaltyAt
from cmdp_fast.reference import Reduction as Reduction


class Kind(NamedTuple):
    """What a modified reward is made of; its formula stands at `cmdp_fast.modified_reward`."""

    penalised: bool
    """It pays ``penalty`` for being over the budget, when ``penalty_at`` says so."""
    coefficient: str | None
    """What its price is called: lambda, or kappa for the barrier; "price" beside a budget, where it may be left out."""
    direct: Literal["discrepancy", "price", "barrier"] | None
    """The amount that the direct term of the gradient carries (`cmdp_fast.objective.direct_coefficient`)."""
    task_reward: Literal["always", "feasible", "inside"]
    """Which tokens keep the task's reward: all, those not in violation, or those up to which budget was left."""

    @property
    def needs_price(self) -> bool:
        """Whether it is nothing without its coefficient."""
        return self.coefficient not in (None, "price")


KINDS: dict[KindName, Kind] = {
    # kind                penalised  coefficient direct         task reward kept
    "cmdp": Kind(True, "price", "discrepancy", "feasible"),
    "hinge": Kind(False, "price", "discrepancy", "always"),
    "saute": Kind(True, None, None, "feasible"),
    "lagrangian": Kind(False, "lambda", "price", "always"),
    "pid": Kind(False, "lambda", "price", "always"),
    "barrier": Kind(False, "kappa", "barrier", "inside"),
    "worst_case": Kind(True, None, None, "feasible"),
}

_OF_KIND: Any = None  # the default of a field that the kind tells


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraint:
    """A cost, its budget and the modified reward that holds a completion to it. Checked once, when it is made.

    Args:
        budget: d >= 0, what a completion may spend in the units of the cost (nats for a KL): a number, or a tensor
            ``[B]`` with a number per sequence, whose values the operations check.
        cost: ``reverse_kl`` (default), ``forward_kl``, ``jsd`` (with ``beta``), ``k1``, ``k3``, ``nll``; in nats. The
            first three depend on the policy and are differentiable. For ``worst_case`` ``nll``, and nothing else.
        kind: a name of `KINDS`; see `cmdp_fast.modified_reward` for the formulas.
        penalty: n >= 0, for ``cmdp``, ``saute`` and ``worst_case``.
        penalty_at: ``crossing`` pays it once, ``every`` at each violating token. None: crossing for ``cmdp``, every for
            ``saute`` and ``worst_case``. Refused for the other kinds.
        discrepancy_weight: beta >= 0 of the excess, for ``cmdp`` and ``hinge``.
        coefficient: lambda (``lagrangian``, ``pid``) or kappa (``barrier``), >= 0; needed there. For ``cmdp`` and
            ``hinge`` the price of every unit of cost, within the budget too; None: 0. Refused for the other kinds.
        barrier_slope: the price of a unit of cost once the barrier is crossed.
        gamma: discount of the *cost*, in (0, 1]. Not with ``reduction="mean"``.
        reduction: ``sum``, or ``mean``: the account is the prefix mean. None: mean for ``worst_case``, else sum.
        edge: ``strict``: a spent budget is feasible; ``saute``: it is a violation.
        per_token: the budget of a sequence is d times its number of unmasked tokens.
        beta: of the cost ``jsd``, in [0, 1].
        cost_clamp: c > 0 in nats puts the cost of every token into [-c, c], for ``k1``, ``k3`` and ``nll``: see
            `cmdp_fast.token_cost`. None: as it is. Where costs are computed: an operation that is given costs, such as
            `cmdp_fast.budget_trace`, takes them as they are.

    Another value of a field: ``dataclasses.replace(constraint, budget=3.0)``. To ``worst_case``, or from it, give the
    cost and the reduction as well, ``kind="worst_case", cost="nll", reduction="mean"``: a default that has been filled
    in is a value like any other. Two constraints are equal if all fields are, tensors number by number.

    Raises:
        TypeError, ValueError: a value that is not allowed, or that its kind does not have.

    Source: after arXiv 2509.22921; the discrepancy term is this project's definition (`cmdp_fast.modified_reward`).
    """

    budget: float | Tensor
    cost: CostName = _OF_KIND
    kind: KindName = "cmdp"
    penalty: float = 1.0
    penalty_at: PenaltyAt | None = None
    discrepancy_weight: float = 1.0
    coefficient: float | None = None
    barrier_slope: float = 10.0
    gamma: float = 1.0
    reduction: Reduction = _OF_KIND
    edge: Edge = "strict"
    per_token: bool = False
    beta: float = 0.5
    cost_clamp: float | None = None

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, tuple(KINDS))
        worst_case = self.kind == "worst_case"
        defaults = {"cost": "nll", "reduction": "mean"} if worst_case else {"cost": "reverse_kl", "reduction": "sum"}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        checks.choice("cost", self.cost, COSTS)
        if worst_case and (self.cost, self.reduction) != ("nll", "mean"):
            raise ValueError(
                "kind='worst_case' is defined for cost='nll' and reduction='mean', "
                f"got {self.cost!r} and {self.reduction!r}"
            )
        if not isinstance(self.budget, Tensor):
            checks.number("budget", self.budget)
            if not self.budget >= 0:
                raise ValueError(f"budget must be at least 0, got {self.budget}")
        elif self.budget.is_complex():
            raise TypeError(f"budget must be real, got {checks.describe(self.budget)}")
        self._check_account()
        self._check_reward()
        checks.share("beta", self.beta)
        check_clamp("cost_clamp", self.cost_clamp, self.cost)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constraint):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in fields(self))
        return hash(tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in values))

    def _check_account(self) -> None:
        checks.discount(self.gamma)
        checks.choice("reduction", self.reduction, get_args(Reduction))
        checks.choice("edge", self.edge, get_args(Edge))
        if not isinstance(self.per_token, bool):
            raise TypeError(f"per_token must be a bool, got {checks.describe(self.per_token)}")
        if self.reduction == "mean" and self.gamma != 1:
            raise ValueError(f"reduction='mean' takes no discount, got gamma={self.gamma}; expected gamma=1")

    def _check_reward(self) -> None:
        for name in ("penalty", "discrepancy_weight", "barrier_slope", "price"):
            value = getattr(self, name)
            name = "coefficient" if name == "price" else name
            checks.number(name, value)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.penalty_at is not None:
            if not self.is_a.penalised:
                raise ValueError(
                    f"kind={self.kind!r} has no penalty, so penalty_at={self.penalty_at!r} means nothing; leave it out"
                )
            checks.choice("penalty_at", self.penalty_at, get_args(PenaltyAt))
        if self.coefficient is None and self.is_a.needs_price:
            raise ValueError(
                f"kind={self.kind!r} needs coefficient= (lambda, or kappa for the barrier), got coefficient=None"
            )
        if self.coefficient is not None and not self.is_a.coefficient:
            raise ValueError(f"kind={self.kind!r} has no coefficient, got coefficient={self.coefficient}")

    @property
    def is_a(self) -> Kind:
        """What its kind is."""
        return KINDS[self.kind]

    @property
    def action_dependent(self) -> bool:
        """Whether the cost of a token depends on the token sampled, so that it has no gradient of its own."""
        return self.cost not in DIFFERENTIABLE_COSTS

    @property
    def at_crossing(self) -> bool:
        """Whether a penalty is paid once, at the first violation, and not at each violating token."""
        return self.penalty_at == "crossing" or (self.penalty_at is None and self.kind == "cmdp")

    @property
    def price(self) -> float:
        """The coefficient; 0 where there is none."""
        return 0.0 if self.coefficient is None else self.coefficient

    @property
    def budget_rule(self) -> BudgetRule:
        """How the account is kept, as a backend takes it."""
        return BudgetRule(float(self.gamma), self.reduction == "mean", self.edge == "saute")

    @property
    def reward_rule(self) -> RewardRule:
        """What is paid, as a backend takes it."""
        amounts = (self.penalty, self.discrepancy_weight, self.price, self.barrier_slope)
        return RewardRule(self.kind, self.at_crossing, *(float(amount) for amount in amounts))

    @property
    def has_direct_term(self) -> bool:
        """Whether the gradient flows through the cost, and not through the sampled tokens alone."""
        amount = {"discrepancy": self.discrepancy_weight or self.price, "price": self.price, "barrier": self.price}
        return not self.action_dependent and bool(self.is_a.direct and amount[self.is_a.direct])

    def warn_of_a_penalty_without_gradient(self, stacklevel: int) -> None:
        """Warns of ``saute`` with a cost that does not depend on the action: nothing but chance leads its student back
        inside the budget."""
        if self.kind == "saute" and not self.action_dependent and not torch.compiler.is_compiling():
            warnings.warn(
                f"kind='saute' with cost={self.cost!r}: the cost does not depend on the action, so the penalty has no "
                "direct gradient and a student may stay over budget; use kind='cmdp' or 'hinge', or cost='k1'",
                stacklevel=stacklevel + 1,
            )


def of_a_scaled_direct_term(scaled: str, instead: str, whose: str = "a group's") -> str:
    """The warning of a setting ``scaled`` that divides advantages by ``whose`` deviation, where the gradient has a
    direct term; ``instead`` is the setting that does not."""
    return (
        f"{scaled} divides the direct term by {whose} standard deviation, by 1e-4 where returns are equal, and "
        "cancels discrepancy_weight where nothing but the excess differs, and a price of every unit of cost where "
        f"nothing but the cost does; {instead} keeps what penalty and discrepancy_weight mean"
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


class AccountSettings(TypedDict, total=False):
    """The fields of a `Constraint` that say how the account is kept, as keywords."""

    gamma: float
    reduction: Reduction | None
    edge: Edge
    per_token: bool


class RewardSettings(TypedDict, total=False):
    """The fields of a `Constraint` that say what is paid, as keywords."""

    kind: KindName
    penalty: float
    penalty_at: PenaltyAt | None
    discrepancy_weight: float
    coefficient: float | None
    barrier_slope: float


class ConstraintSettings(AccountSettings, RewardSettings, total=False):
    """All fields of a `Constraint` but its budget, as keywords."""

    cost: CostName | None
    beta: float
    cost_clamp: float | None


def _made(values: Mapping[str, Any]) -> Constraint:
    """A constraint of these fields; the same one if it has been made before. Nobody can change it."""
    if torch.compiler.is_compiling() or not all(type(value) in _PLAIN for value in values.values()):
        return Constraint(**values)
    return _made_before(**values)


_PLAIN = (float, int, str, bool, type(None))


@functools.lru_cache(maxsize=64, typed=True)  # typed: 1 and True are equal, and one of them is refused
def _made_before(**values: Any) -> Constraint:
    return Constraint(**values)


def check_clamp(name: str, value: float | None, cost: CostName) -> None:
    """Raises TypeError or ValueError unless costs may be clamped to this size."""
    if value is None:
        return
    checks.positive(name, value)
    if cost in DIFFERENTIABLE_COSTS:
        raise ValueError(
            f"{name}={value} with cost={cost!r}: where it takes effect the cost would have no gradient; expected "
            "one of k1, k3, nll, which have none"
        )


def checked(constraint: object) -> Constraint:
    """The constraint itself. Raises TypeError for anything else, such as the name of a kind."""
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint must be a cmdp_fast.Constraint, got {checks.describe(constraint)}")
    return constraint


def constraint_of(
    operation: str,
    constraint: Constraint | None,
    settings: Mapping[str, Any],
    allowed: Iterable[str] = ConstraintSettings.__annotations__,
    **budget: float | Tensor | None,
) -> Constraint:
    """The constraint that an operation was given, as such or as keywords.

    ``budget``: what was given as that, by an operation that has it; None for nothing. Raises TypeError for both a
    constraint and keywords, for neither, and for a keyword that the operation does not have.
    """
    for name in settings:
        if name not in allowed:
            raise TypeError(f"{operation}() got an unexpected keyword argument {name!r}")
    given = dict(settings)
    for name, value in budget.items():
        if value is not None:
            given[name] = value
    if constraint is None:
        if "budget" in budget and "budget" not in given:
            raise TypeError(f"{operation}() needs a budget, or constraint=")
        return _made({"budget": 0.0} | given)  # a reward needs no budget: its trace has accounted for it
    if given:
        repeated = ", ".join(f.name for f in fields(Constraint) if f.name in given)
        raise TypeError(f"{operation}() got constraint= and, of its fields, also {repeated}; expected one or the other")
    return checked(constraint)
