"""The estimates of the gradient: which of them are unbiased, and what is measured of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from exact import repeated, roll_out, tree

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gradient_page

gradient_variance = pytest.importorskip("gradient_variance", reason="needs the trainer's packages")

PROBLEMS = {"tree": (tree(), 0.3), "two trees": (repeated(tree(), 2), 0.6)}
ESTIMATORS = [(kind, each) for kind, own in gradient_variance.estimators(0.3, 0.4).items() for each in own]
UNBIASED = {
    "position_rloo",
    "rloo",
    "no baseline, whole return",
    "no baseline, return to go",
    "gae, exact values, lambda 1",
    "gae, exact values, lambda 0.95",  # with exact values every lambda is
    "k1 in the reward",
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("place", range(len(ESTIMATORS)), ids=[f"{kind}: {each.name}" for kind, each in ESTIMATORS])
def test_what_is_unbiased_is_and_what_is_not_is_not(place, name):
    """Of 1,000 estimates the mean of each coordinate is within 4 standard errors of the gradient, or it is far off."""
    problem, budget = PROBLEMS[name]
    kind, _ = ESTIMATORS[place]
    own = gradient_variance.estimators(budget, 0.4)[kind]
    estimator = own[place - (0 if kind == "cmdp" else len(gradient_variance.estimators(budget, 0.4)["cmdp"]))]
    logits = gradient_variance.policies(problem)["random"]
    truth = gradient_variance.exact_gradient(problem, logits, own[0].method.setting).flatten()
    found = gradient_variance.estimates(problem, logits, estimator, 1000)
    off, error = (found.mean(0) - truth).abs(), found.std(0) / len(found) ** 0.5
    figures = gradient_variance.measured(found, truth, rescaled=estimator.rescaled)
    if estimator.rescaled:  # both terms by one number, or the direction is another one
        assert figures["cosine of the mean"] > 0.999
    elif estimator.name in UNBIASED:
        assert (off < 4 * error + 1e-12).all()
        assert figures["beyond"] < gradient_page.CHANCE
    else:
        assert (off > 10 * error).any()
        assert figures["beyond"] > gradient_page.CHANCE


def test_exact_values_are_expectations():
    """Before the first token the objective, and before each the mean of what follows."""
    problem = repeated(tree(), 2)
    setting = gradient_variance.estimators(0.6, 0.4)["cmdp"][0].method.setting
    logits = gradient_variance.policies(problem)["random"]
    value, rollout = gradient_variance.exact_values(problem, logits, setting), roll_out(problem, logits, setting)
    objective = rollout.expect(rollout.reward.sum(1))
    torch.testing.assert_close(value[:, 0], objective.expand(81))
    following = torch.cat([value[:, 1:], torch.zeros(81, 1).double()], 1)
    onward = rollout.reward + following
    for t in range(4):  # paths that share t tokens are neighbours
        share, next_ = (each.unflatten(0, (3**t, -1)) for each in (rollout.probability, onward[:, t]))
        torch.testing.assert_close((share * next_).sum(1) / share.sum(1), value[:: 3 ** (4 - t), t])


def test_bias_and_variance_are_measured():
    """Of normal numbers with a known spread around a point that is off by a known vector."""
    truth = torch.tensor([3.0, 4.0]).double()
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double()
    found = gradient_variance.measured(truth + torch.tensor([0.0, 5.0]) + 0.5 * noise, truth, rescaled=False)
    assert found["variance"] == pytest.approx(2 * 0.25 / 25, rel=0.1)
    assert found["bias2"] == pytest.approx(1.0, rel=0.01)
    centred = gradient_variance.measured(7.0 * (truth + 0.5 * noise), truth, rescaled=True)
    assert centred["variance"] == pytest.approx(2 * 0.25 / 25, rel=0.1)
    assert centred["beyond"] < gradient_page.CHANCE


def test_the_table_says_from_how_many_completions_the_long_term_part_pays():
    """By hand: 64 completions save 0.1 of variance for a bias² of 0.05, so with 128 the two are equal."""
    common = {"objective": "cmdp", "tokens": 2, "policy": "random"}
    rows = [
        common | {"estimator": "position_rloo", "variance": 0.3, "bias2": 0.0, "beyond": 1.0},
        common | {"estimator": "without the long-term part", "variance": 0.2, "bias2": 0.05, "beyond": 100.0},
    ]
    assert gradient_page.long_term_table(rows, 64)[-1] == "| `cmdp` | 2 | random | 0.3 | 0.25 | 128 completions |"


def test_the_page_counts_where_the_long_term_part_helps():
    """By hand: it is worth 2 points in one case, costs 1 in another, and 0.1 with signs of both in the third."""

    def rows(tokens: int, whole: list[float], without: list[float]) -> list[dict]:
        common = {"tokens": tokens, "start": "teacher", "method": "hinge"}
        return [
            common | {"left out": "nothing", "score": whole, "objective": whole},
            common | {"left out": "long-term part", "score": without, "objective": without},
        ]

    cases = [
        *rows(2, [0.52, 0.53, 0.5201], [0.5, 0.51, 0.5]),
        *rows(4, [0.49, 0.4899, 0.49], [0.5, 0.5, 0.5]),
        *rows(8, [0.51, 0.5, 0.493], [0.5, 0.5, 0.5]),
    ]
    (text,) = gradient_page.long_term_ends(cases)
    assert "changes by -1.00 to 2.00 points" in text
    assert "helps in 1 and does harm in 1; the rest is not told apart" in text
