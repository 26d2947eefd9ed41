"""The best policy of a bandit and of a two-step tree whose every path has a budget, by backward induction.

With a reverse KL, the costs of a path do not depend on its last action, so a state is worth what the best policy there
earns within what is left of the budget. Each state's problem is a bandit, and a bandit's best policy is the teacher
tilted by its values. What a root spends is the one unknown of the tree.
"""

from __future__ import annotations

import torch
from exact import Problem
from torch import Tensor


def tilted(teacher: Tensor, value: Tensor, budget: Tensor) -> Tensor:
    """The largest pi·value with KL(pi‖teacher) <= budget, [K]; teacher [V], value [K, V], budget [K].

    pi is proportional to teacher exp(value/lambda). Its KL falls in lambda, which is found by bisection; the end that
    is taken is within the budget.
    """
    value = value.broadcast_to(*budget.shape, len(teacher))

    def policy(log_price: Tensor) -> Tensor:
        return (teacher.log() + value / log_price.exp()[..., None]).softmax(-1)

    low, high = torch.full_like(budget, -12.0), torch.full_like(budget, 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        pi = policy(middle)
        over = torch.special.xlogy(pi, pi / teacher).sum(-1) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (policy(high) * value).sum(-1)


def best_value(problem: Problem, budget: float, points: int = 201) -> float:
    """The best expected reward of the bandit or the tree of exact.py with no path over budget.

    What the root spends is searched on a grid, and then on finer ones around the best of it. Whatever it is, the value
    that is returned is one of a policy within the budget.
    """
    actions = problem.teacher.shape[1]
    reward = problem.reward.sum(1)
    if problem.tokens.shape[1] == 1:
        return float(tilted(problem.teacher[0], reward, torch.tensor([budget]).double()))
    reward = reward.reshape(actions, actions)
    first, last = 0.0, budget
    for _ in range(6):
        root = torch.linspace(first, last, points, dtype=torch.float64)
        pairs = zip(problem.teacher[1:], reward, strict=True)
        worth = torch.stack([tilted(teacher, row, budget - root) for teacher, row in pairs], -1)
        values = tilted(problem.teacher[0], worth, root)
        at, width = int(values.argmax()), (last - first) / (points - 1)
        first, last = max(0.0, float(root[at]) - width), min(budget, float(root[at]) + width)
    return float(values.max())
