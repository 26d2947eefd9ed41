"""Fields of public NamedTuples: documented where Python looks, and otherwise as they were."""

import importlib
import inspect
import pickle
import re
import sys
import zipfile

import pytest
import torch
from torch.utils import _pytree

import cmdp_fast as cf
from cmdp_fast import advantage, credit, metrics
from cmdp_fast.field_docs import documented

PUBLIC = [getattr(cf, name) for name in cf.__all__ if hasattr(getattr(cf, name), "_fields")]
KINDS = [*PUBLIC, advantage.GroupAdvantage, credit.Credit, credit.TaskRewards, metrics.Divergences]


def test_the_public_ones_are_known():
    names = {"TokenStats", "BudgetTrace", "ConstrainedReward", "TopkStats", "BudgetVerdict", "Head"}
    assert {kind.__name__ for kind in PUBLIC} == names


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_says_what_stands_below_it(kind):
    source = inspect.getsource(kind)
    for name in kind._fields:
        text = getattr(kind, name).__doc__
        assert "Alias for field" not in text, name
        below = source.partition(f"\n    {name}: ")[2].partition("\n")[2].lstrip()
        assert re.sub(r"\s+", " ", below).startswith('"""' + re.sub(r"\s+", " ", text) + '"""')


def test_a_class_without_a_source_stays_as_it_is():
    made: dict[str, type] = {}
    exec("from typing import NamedTuple\nclass Bare(NamedTuple):\n    one: int\n", {"__name__": "sys"}, made)
    assert documented(made["Bare"]) is made["Bare"]
    assert made["Bare"].one.__doc__ == "Alias for field number 0"


def test_a_class_in_a_zip_file_stays_as_it_is(tmp_path, monkeypatch):
    text = 'from typing import NamedTuple\nclass Packed(NamedTuple):\n    one: int\n    """What it is."""\n'
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("module_in_a_zip_file.py", text)
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    kind = importlib.import_module("module_in_a_zip_file").Packed
    assert documented(kind) is kind and kind.one.__doc__ == "Alias for field number 0"
    del sys.modules[kind.__module__]


def test_they_are_still_tuples_to_pickle_and_to_torch():
    stats = cf.TokenStats(*torch.rand(6, 2, 3))
    copy = pickle.loads(pickle.dumps(stats))
    assert type(copy) is cf.TokenStats and torch.equal(copy.forward_kl, stats.forward_kl)
    doubled = _pytree.tree_map(lambda t: 2 * t, stats)
    assert type(doubled) is cf.TokenStats and torch.equal(doubled.entropy, 2 * stats.entropy)
