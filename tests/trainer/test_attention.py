"""--attn-implementation: a name of transformers' list, and what it says otherwise."""

from __future__ import annotations

import re

import pytest
from tiny_pair import settings

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.models.pair import load_pair
from cmdp_fast.trainer.records.report import Report


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_implementation": "flash"}, "--attn-implementation flash: transformers has eager, "),
        ({"attn_implementation": "paged|eager"}, "transformers has eager, "),
        ({"attn_implementation": "flash_attention_2"}, "needs --mixed-precision bf16"),
        ({"attn_implementation": "owner/kernel"}, "is code from the hub, which would run: --trust-remote-code"),
    ],
)
def test_attention_that_cannot_be_used(changes, reason, pair):
    with pytest.raises(InputError, match=re.escape(reason)) as raised:
        load_pair(settings(pair, **changes), [], Report())
    assert "\n" not in str(raised.value)


def test_attention_that_is_not_installed(pair, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    config = settings(pair, attn_implementation="flash_attention_2", mixed_precision="bf16")
    with pytest.raises(InputError, match="--attn-implementation flash_attention_2 needs the package flash-attn"):
        load_pair(config, [], Report())


@pytest.mark.parametrize("name", ["", "eager", "sdpa"])
def test_attention_is_that_of_the_setting(name, pair):
    student, teacher, _ = load_pair(settings(pair, attn_implementation=name), [], Report())
    for model in (student, teacher):
        assert model.config._attn_implementation == (name or "sdpa")
