"""Who answers, out of JSON that somebody else wrote: a server's word, or a file's."""

from __future__ import annotations

from typing import Any, get_type_hints

from cmdp_fast.errors import readable

from .teacher import TeacherAbout

LONGEST = 1000  # characters of a text
DTYPES = ("bfloat16", "float16", "float32", "float64")  # in which models compute
_MOST_ENDS = 1000


def about_of(said: Any) -> TeacherAbout:
    """A teacher that answers with hidden states or log-probabilities. Raises ValueError, in one line, for anything
    else."""
    hints = get_type_hints(TeacherAbout).items()
    kinds = {name: int if kind is int else list if name == "ends" else str for name, kind in hints}
    if not isinstance(said, dict) or said.keys() != kinds.keys():
        raise ValueError(f"it says other things of itself than {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(said[name]) is not kind:
            raise ValueError(f"its {name} is no {kind.__name__}")
        if kind is str and (len(said[name]) > LONGEST or readable(said[name], LONGEST) != said[name]):
            raise ValueError(f"its {name} is no plain text of up to {LONGEST} characters")
    about = TeacherAbout(**{**said, "ends": tuple(said["ends"])})
    if len(about.ends) > _MOST_ENDS or not all(type(e) is int and 0 <= e < about.vocab_size for e in about.ends):
        raise ValueError("its ends are no tokens that it has")
    if about.answers not in ("hidden", "topk"):
        raise ValueError("it answers with something else than hidden states or log-probabilities")
    if about.dtype not in DTYPES:
        raise ValueError(f"it computes in something else than {', '.join(DTYPES)}")
    least = 0 if about.answers == "topk" else 1
    if not (0 < about.vocab_size < 1 << 31 and least <= about.hidden_size < 1 << 24 and 0 <= about.positions < 1 << 31):
        raise ValueError("it has sizes that no model has")
    return about
