"""Teachers on vLLM, our side: parity with a teacher in this process, and what a server may not answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_pair import tiny_model
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn

from cmdp_fast.errors import InputError
from cmdp_fast.heads import head_of
from cmdp_fast.teachers.in_process import TeacherInProcess
from cmdp_fast.teachers.open import check_vocabulary, open_teacher
from cmdp_fast.teachers.teacher import Asking, head_digest
from cmdp_fast.trainer.stops import end_tokens

ROWS = ([3, 4, 5, 6, 7], [8], [9, 10, 11], [5] * 9)
WANTED = (2, 1, 0, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models whose norms are of their own; the second is another than the first."""
    made = []
    for seed, family in ((1, "llama"), (2, "llama"), (3, "gemma2")):
        folder = tiny_model(tmp_path_factory.mktemp("model"), seed=seed, spare=2, family=family)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        model.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture
def server(folders):
    with StandIn(folders[0]).served() as running:
        yield running


def opened(server, options="", **asking):
    return open_teacher(f"vllm:{server.url}{options}", Asking(**asking))


@pytest.mark.parametrize(("which", "dtype"), [(0, "float32"), (2, "float32"), (0, "bfloat16")])
def test_hidden_states_and_head_are_the_models(folders, which, dtype):
    """To the bit, in the dtype that the server computes in, which is seen in what it says."""
    with StandIn(folders[which]).served() as server:
        server.model.to(getattr(torch, dtype))
        teacher, local = opened(server), TeacherInProcess(server.model, server.tokenizer, "served")
        assert teacher.about.dtype == dtype and teacher.about.answers == "hidden"
        assert teacher.about.head == local.about.head == head_digest(head_of(server.model))
        assert teacher.about.tokenizer == local.about.tokenizer
        assert (teacher.about.vocab_size, teacher.about.hidden_size) == head_of(server.model).weight.shape
        assert teacher.about.positions == server.room
        assert teacher.about.ends == opened(server, "?k=1").about.ends == end_tokens(server.model, server.tokenizer)
        check_vocabulary(teacher, server.tokenizer)
        for wire in ("", "float32"):
            said = opened(server, dtype=wire).answer(ROWS, WANTED)
            alone = [local.answer([row], [count]).as_hidden() for row, count in zip(ROWS, WANTED, strict=True) if count]
            assert torch.equal(said.as_hidden(), torch.cat(alone))
            tokens = sum(len(row) for row, count in zip(ROWS, WANTED, strict=True) if count)
            size = 4 if wire else said.hidden.itemsize
            assert said.bytes == tokens * teacher.about.hidden_size * size


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_narrow_wire_costs_its_rounding(server, wire):
    said, exact = opened(server, dtype=wire).answer(ROWS, WANTED), opened(server).answer(ROWS, WANTED)
    assert said.hidden.dtype == torch.float32 and said.bytes * 2 == exact.bytes
    off = (said.hidden - exact.hidden).abs()
    assert (off <= torch.finfo(getattr(torch, wire)).eps / 2 * exact.hidden.abs()).all() and off.any()


def test_the_likeliest_tokens_are_the_models(server):
    """Of all tokens' log-probabilities the largest, in their order; the prompt's own token is not among them for being
    there."""
    teacher = opened(server, "?k=4")
    assert teacher.about.answers == "topk" and teacher.about.positions == server.room - 2 and teacher.head is None
    said = teacher.answer(ROWS, WANTED)
    with torch.no_grad():
        rows = [
            server.model(torch.tensor([row])).logits[0, len(row) - count :].log_softmax(-1)
            for row, count in zip(ROWS, WANTED, strict=True)
        ]
    expected = torch.cat(rows).topk(4)
    torch.testing.assert_close(said.topk.logprobs, expected.values)
    assert torch.equal(said.topk.ids, expected.indices) and said.topk.floor is None
    with pytest.raises(ValueError, match="63 tokens; served takes 62"):
        teacher.ask([[3] * 63], [1])


@pytest.mark.parametrize("options", ["", "?k=3"])
def test_nothing_wanted_is_not_asked_for(server, options):
    teacher = opened(server, options)
    asked = len(server.asked)
    said = teacher.answer([[3, 4], []], [0, 0])
    assert len(server.asked) == asked and said.bytes == 0
    assert (said.topk.ids if options else said.hidden).shape[0] == 0


def test_completions_are_laid_out_as_those_of_any_teacher(server):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    tokens = torch.randint(3, 15, (3, 3), generator=torch.Generator().manual_seed(1)).masked_fill(~mask, 0)
    prompts = torch.tensor([[0, 4], [5, 6], [7, 8]])
    batch = SimpleNamespace(prompt_ids=prompts, prompt_mask=prompts > 0, tokens=tokens, mask=mask, lengths=None)
    local = TeacherInProcess(server.model, server.tokenizer).of_completions(batch)
    said = opened(server).of_completions(batch)
    torch.testing.assert_close(said.as_hidden(), local.as_hidden())
    torch.testing.assert_close(said.as_logits(), local.as_logits())
    topk = opened(server, "?k=2").of_completions(batch).topk
    assert topk.ids.shape == (3, 3, 2) and topk.ids[~mask].eq(0).all()
    expected = local.as_logits().log_softmax(-1).topk(2).values
    torch.testing.assert_close(topk.logprobs[mask], expected[mask])


def test_a_word_is_said_where_the_server_wants_one(server, tmp_path):
    (tmp_path / "key").write_text("open-sesame\n")
    opened(server, f"?check={server.url}", token_file=str(tmp_path / "key")).answer(ROWS, WANTED)
    assert server.keys == {"Bearer open-sesame"}


# --------------------------------------------------------------------------------------------------------------
# Another model than it is taken for


def test_hidden_states_of_another_norm_are_refused(server, folders):
    with pytest.raises(InputError, match=r"do not belong together: .* mean square 1"):
        opened(server, f"?model={folders[1]}")
    honest = server.answer
    server.answer = lambda path, body: honest(path, body | {"use_activation": True})
    with pytest.raises(InputError, match="--runner pooling --convert embed"):
        opened(server)


@pytest.mark.parametrize("wire", ["", "bfloat16"])
def test_a_server_started_again_with_another_model_is_refused(server, folders, wire):
    teacher = opened(server, dtype=wire)
    teacher.answer(ROWS, WANTED)
    server.model = AutoModelForCausalLM.from_pretrained(folders[1])
    with pytest.raises(InputError, match="do not belong together"):
        teacher.answer(ROWS, WANTED)


def change_head(model):
    model.lm_head.weight.data.neg_()


def change_softcap(model):
    model.config.final_logit_softcapping = 0.05


@pytest.mark.parametrize(("which", "change"), [(0, change_head), (2, change_softcap)])
def test_another_head_is_refused_by_a_server_that_generates(folders, which, change):
    """The hidden states are the same: nothing but log-probabilities tells."""
    with StandIn(folders[which]).served() as server, StandIn(folders[which]).served() as generating:
        opened(server, f"?check={generating.url}")
        change(generating.model)
        with pytest.raises(InputError, match=rf"give other log-probabilities than the vLLM server at {generating.url}"):
            opened(server, f"?check={generating.url}")


# --------------------------------------------------------------------------------------------------------------
# Wrong answers


def on(path, change):
    return lambda asked, body, answer: change(answer) if asked == path else answer


def entries(change):
    """A change of the log-probabilities at the last token but the first prompt's."""

    def changed(answer):
        at_token = answer["choices"][0]["prompt_logprobs"][-1]
        answer["choices"][0]["prompt_logprobs"][-1] = change(dict(at_token))
        return answer

    return on("/v1/completions", changed)


def choices(change):
    return on("/v1/completions", lambda answer: {"choices": change(answer["choices"])})


def renamed(at_token, name):
    """The likeliest token, under another name."""
    return {name: next(iter(at_token.values())), **dict(list(at_token.items())[1:])}


def value(number):
    return entries(lambda at_token: {name: {"logprob": number} for name in at_token})


HIDDEN = {
    "a byte less": (on("/pooling", lambda content: content[:-1]), "bytes of hidden states"),
    "a token less": (on("/pooling", lambda content: content[:-64]), "bytes of hidden states"),
    "a token more": (
        on("/pooling", lambda content: content + content[:64]),
        "bytes of hidden states|answered with more than",
    ),
    "nothing": (on("/pooling", lambda _: b""), "returned 0 bytes of hidden states"),
    "not finite": (
        on("/pooling", lambda content: b"\xff\xff\xff\x7f" + content[4:]),
        "hidden states that are not finite",
    ),
    "an error": (on("/pooling", lambda _: (400, {"error": {"message": "no\x1b[2J such"}})), r"answered 400: no\?"),
    "no pooling": (on("/pooling", lambda _: (404, {"detail": "Not Found"})), "answered 404.*pooling"),
}
TOPK = {
    "too few": (entries(lambda each: dict(list(each.items())[:1])), "1 log-probabilities at a token"),
    "too many": (entries(lambda each: each | {"0": {"logprob": -9.0}, "1": {"logprob": -9.0}}), "log-probabilities at"),
    "a token that is none": (entries(lambda each: renamed(each, "99")), "that is none of 19: '99'"),
    "a token that is text": (entries(lambda each: renamed(each, "-1")), "that is none of 19: '-1'"),
    "positive": (value(0.5), "no log-probability: 0.5"),
    "NaN": (value(float("nan")), "is not JSON"),
    "null": (value(None), "no log-probability: None"),
    "true": (value(True), "no log-probability: True"),
    "a number without end": (value(-(10**400)), "no log-probability: -1000"),
    "a token twice": (
        entries(lambda each: {**dict(list(each.items())[:2]), f"0{next(iter(each))}": {"logprob": -9.0}}),
        "a token's log-probability twice",
    ),
    "more than one in all": (value(-0.1), "sum of probabilities is more than 1.*raw_logprobs"),
    "not the prompt's": (
        entries(lambda each: {str((int(name) + 9) % 17): entry for name, entry in each.items()}),
        "without that of the prompt's own token",
    ),
    "another prompt": (choices(lambda each: [{**each[0], "prompt_token_ids": [1]}, *each[1:]]), "another prompt"),
    "a place less": (
        choices(lambda each: [{**each[0], "prompt_logprobs": each[0]["prompt_logprobs"][1:]}, *each[1:]]),
        "log-probabilities at",
    ),
    "a prompt less": (choices(lambda each: each[1:]), "answers to other prompts"),
    "one twice": (choices(lambda each: [*each, each[0]]), "answers to other prompts"),
    "no log-probabilities": (choices(lambda each: [{"index": i} for i in range(len(each))]), "without the prompts'"),
    "no table": (on("/v1/completions", lambda _: [1]), "without the prompts'"),
    "no JSON": (on("/v1/completions", lambda _: b"<html>"), "is not JSON"),
    "nesting": (on("/v1/completions", lambda _: b"[" * 100_000), "is not JSON"),
    "too long": (on("/v1/completions", lambda _: b" " * (1 << 18)), "answered with more than"),
    "a k that is not given": (on("/v1/completions", lambda _: (400, {"error": {"message": "max 20"}})), "400: max 20"),
}
ABOUT = {
    "no model": (on("/v1/models", lambda _: {"data": []}), "names no model"),
    "an infinite length": (
        on("/v1/models", lambda answer: b'{"data": [{"id": "m", "root": "r", "max_model_len": 1e999}]}'),
        "names no model",
    ),
    "no length": (on("/v1/models", lambda _: {"data": [{"id": "m", "root": "r", "max_model_len": -9}]}), "names no"),
    "no root": (on("/v1/models", lambda _: {"data": [{"id": "m", "max_model_len": 9}]}), "names no model"),
    "a root of another machine": (
        on("/v1/models", lambda _: {"data": [{"id": "m", "root": "/no/such", "max_model_len": 9}]}),
        r"no configuration of the model /no/such .*\?model=FOLDER",
    ),
    "another tokenizer": (on("/tokenize", lambda answer: {"tokens": answer["tokens"][1:]}), "has another tokenizer"),
    "no tokens": (on("/tokenize", lambda _: {"tokens": "abc"}), "tokens that are no list"),
}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(("", name) for name in HIDDEN | ABOUT),
        *(("?k=3", name) for name in TOPK | ABOUT),
    ],
)
def test_a_wrong_answer_is_named(server, options, name):
    """Where a teacher is opened, and where it was open before the server went wrong."""
    fault, expected = (HIDDEN | TOPK | ABOUT)[name]
    teacher = opened(server, options)
    server.fault = fault
    for asked in (lambda: opened(server, options), *([] if name in ABOUT else [lambda: teacher.answer(ROWS, WANTED)])):
        with pytest.raises(InputError, match=expected) as raised:
            asked()
        assert (server.url in str(raised.value) or "/no/such" in str(raised.value)) and str(raised.value).isprintable()


def test_another_width_is_refused(server):
    """A server that was started again with a larger model, under an open teacher."""
    teacher = opened(server)
    server.fault = on("/pooling", lambda content: content[: len(content) // 2])
    with pytest.raises(InputError, match="bytes of hidden states"):
        teacher.answer(ROWS, WANTED)


def test_a_server_that_hangs_is_not_waited_for(server):
    teacher = opened(server, seconds=0.5)
    released = threading.Event()
    server.fault = lambda path, body, answer: released.wait(30) and answer
    with pytest.raises(InputError, match=r"has not answered in 0.5 s \(--teacher-timeout\)"):
        teacher.answer(ROWS, WANTED)
    released.set()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("localhost:8000", "no address"),
        ("http://host:x", "no address"),
        ("http://u:p@host", "no address"),
        ("http://host?k=0", "k=0"),
        ("http://host?k=x", "k=x"),
        ("http://host?k=2&k=3", "the options"),
        ("http://host?kk=2", "the options"),
        ("http://host?model=", "the options"),
        ("http://host?k=2&check=http://other", "checked by nothing"),
    ],
)
def test_a_place_that_is_none_is_refused(place, message):
    with pytest.raises(InputError, match=rf"vllm:http.*{message}|vllm:localhost.*{message}"):
        open_teacher(f"vllm:{place}")


def test_what_vllm_does_not_give_is_refused(server):
    with pytest.raises(InputError, match="sends no int8: expected one of float32"):
        opened(server, dtype="int8")
    with pytest.raises(InputError, match=r"\?k=99: .* has 19 tokens"):
        opened(server, "?k=99")
