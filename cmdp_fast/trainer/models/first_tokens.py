"""A model's first tokens, before any work.

What its files say may be what no model can go on with, such as layers of a kind that it does not have or an encoder
beside it. transformers makes it all the same, and fails where it reads or goes on with a text: so that is tried with a
token, which takes as long as a token does, draws nothing and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.heads import evaluating

from ..distributed import of_others


def check_first_tokens(
    models: Mapping[str, Any], names: Mapping[str, str], uses: Mapping[str, Callable[[Any], object]]
) -> None:
    """Raises InputError for one of the models, by its role, with which something fails that it is to be used for: what
    is done is in ``uses``, ``names`` has the folders or hub ids.

    Models without parameters, a student with its adapter off, are not asked. With FSDP every process must call it.
    """
    for role, model in models.items():
        if next(model.parameters(), None) is not None and role in uses:
            with torch.no_grad(), evaluating(model), failing_in_a_line(role, names[role], model):
                uses[role](model)


@contextmanager
def failing_in_a_line(role: str, name: str, model: Any) -> Iterator[None]:
    """Has an error of a model that somebody else has described be an InputError; not one of the machine that it is on,
    or of other processes."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if of_others(error):
            raise
        raise InputError(
            f"--{role} {name} cannot be used: {type(model).__name__} fails at a first token, with "
            f"{type(error).__name__}: {readable(first_line(error))}; a field of its config.json may be the reason"
        ) from error
