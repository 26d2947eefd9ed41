"""Cases of token_stats as a rank that holds all columns: the states, the exchange and the gradient of a shard."""

import pytest
import torch
from fuzzing import laws, running
from fuzzing.case import Tensors, evaluate
from fuzzing.draws import seed_of

import cmdp_fast as cf

CASES = 300  # of all operations, a fifth of which are token_stats


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_one_rank_that_holds_all_columns(name: str, one_rank: None) -> None:
    if cf.available_backends()[name] is not None:
        pytest.skip("not available here")
    group, held = torch.distributed.group.WORLD, 0
    for number in range(CASES):
        seed = seed_of(number)
        case = running.case_of(seed)
        if case.operation != "token_stats":
            continue
        settings = {key: value for key, value in case.settings.items() if key != "inplace_backward"}

        def call(tensors: Tensors, settings: dict = settings) -> Tensors:
            return cf.token_stats(**tensors, **settings, process_group=group, backend=name)._asdict()

        truth = laws.Truth(case)
        outcome = evaluate(case, laws.plain_tensors(case.given), call=call)
        try:
            laws.errors_are_no_worse(case, outcome, truth)
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}\n{case.describe()}", pytrace=False)
        held += 1
    assert held > 30
