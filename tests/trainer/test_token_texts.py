"""The text of each token, which all together are the completion's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cmdp_fast.trainer.records.token_texts import BROKEN, cut_texts, token_texts


@pytest.fixture(scope="module")
def of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte, as a byte-level BPE without merges has them."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | {"<end>": len(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_a_character_is_with_its_last_byte(of_bytes):
    ids = of_bytes("a é 🙂\n")["input_ids"]
    assert token_texts([*ids, of_bytes.eos_token_id], of_bytes) == [
        *("a", " ", "", "é", " ", "", "", "", "🙂", "\n"),
        "",
    ]


@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_all_together_are_the_text(of_bytes, ids):
    """Whatever a model samples: half characters, ends in the middle."""
    texts = token_texts(ids, of_bytes)
    assert len(texts) == len(ids)
    if BROKEN not in (whole := of_bytes.decode(ids, skip_special_tokens=True)):
        assert "".join(texts) == whole


@given(text=st.text(max_size=30))
def test_every_text_has_its_tokens(of_bytes, text):
    ids = of_bytes(text)["input_ids"]
    assert "".join(token_texts(ids, of_bytes)) == of_bytes.decode(ids)


def test_nothing_has_none(of_bytes):
    assert token_texts([], of_bytes) == []


def test_where_texts_do_not_grow_each_token_is_read_alone(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path, seed=1))

    class Backwards:
        def decode(self, ids, **settings):
            return tokenizer.decode(list(ids)[::-1], **settings)

    assert token_texts(tokenizer("12+3")["input_ids"], Backwards()) == ["1", "2", "+", "3"]


def test_a_stop_string_is_cut_off():
    assert cut_texts(["ab", "c\n\n", "x"], 4) == ["ab", "c\n", ""]


def test_a_word_keeps_the_space_that_a_first_one_has_not():
    """As in tokenizers of SentencePiece's kind."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁word": 1, "s": 2}, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    ours = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert ours.decode([1]) == "word"
    assert token_texts([0, 1, 2, 1], ours) == ["a", " word", "s", " word"]
