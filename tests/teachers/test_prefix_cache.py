"""A teacher that reads each prompt once says what one says that reads every row as a whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny

from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.prefix_cache import PrefixCachedTeacher

TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(101)})


def completions(prompts, lengths, seed=0):
    """(rows, wanted) of completions behind some prompts, in turn; what is asked of a row is that of its completion."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 101, (length,), generator=generator).tolist()

    texts = [tokens(length) for length in prompts]
    return [[*texts[i % len(texts)], *tokens(length)][:-1] for i, length in enumerate(lengths)], list(lengths)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_those_of_whole_rows_but_for_rounding(family, dtype):
    """The error against float64 is that of whole rows, and a prompt is read once."""
    model = tiny(family).to(dtype)
    cached = PrefixCachedTeacher(model, TOKENIZER, most=1 << 20)
    rows, wanted = completions([7, 4, 1], [5, 1, 3, 8, 2, 6, 4])
    exact = TeacherInProcess(tiny(family).to(dtype).double(), TOKENIZER).answer(rows, wanted).as_hidden()
    for asked in (rows, [*rows[3:], *rows[:3]], rows):
        counts = wanted if asked is rows else [*wanted[3:], *wanted[:3]]
        truth = exact if asked is rows else torch.cat([exact[9:], exact[:9]])
        said, itself = (each.answer(asked, counts).as_hidden() for each in (cached, TeacherInProcess(model, TOKENIZER)))
        error, own = ((each.double() - truth).abs().max() for each in (said, itself))
        assert error <= 2 * own + 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert cached.read == 6 + 3 and cached.shared == 2 * (6 + 3)  # the last prompt has nothing but its last token


def test_rows_of_which_nothing_is_wanted_and_rows_without_a_prompt():
    teacher, itself = (
        kind(tiny(), TOKENIZER, **more)
        for kind, more in ((PrefixCachedTeacher, {"most": 1 << 20}), (TeacherInProcess, {}))
    )
    rows, wanted = [[5, 6, 7], [], [8, 9], [5, 6, 7]], [0, 0, 2, 1]
    torch.testing.assert_close(teacher.answer(rows, wanted).as_hidden(), itself.answer(rows, wanted).as_hidden())
    assert teacher.answer([], []).as_hidden().shape == (0, 16)


def test_what_was_longest_not_asked_for_goes_first():
    teacher = PrefixCachedTeacher(tiny(), TOKENIZER, most=(2 * 2 * 16 * 4) * 10)  # keys and values of two layers

    def read(*prompt):
        before = teacher.read
        teacher.answer([[*prompt, 9]], [1])
        return teacher.read > before

    assert read(1, 2, 3, 4) and read(2, 2, 3, 4) and not read(1, 2, 3, 4)
    assert read(3, 2, 3, 4) and not read(1, 2, 3, 4) and read(2, 2, 3, 4)
    assert read(*range(12)) and not read(*range(12)) and read(1, 2, 3, 4)  # more than all, alone


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "gemma2",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "Gemma2ForCausalLM does not keep the keys",
        ),
        ("mistral", {"sliding_window": 4}, "MistralForCausalLM does not keep the keys and values of all tokens"),
        ("mamba", {"state_size": 4}, "MambaForCausalLM"),
    ],
)
def test_a_model_that_keeps_something_else_is_refused(family, changes, reason):
    with pytest.raises(TypeError, match=reason):
        PrefixCachedTeacher(tiny(family, **changes), TOKENIZER, most=1 << 20)
