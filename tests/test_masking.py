"""What of a text is a secret, what is not, and whose folder it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cmdp_fast.masking import home, masked, public, public_words, without_secrets

SECRETS = {
    "OPENAI_API_KEY=abc run": "OPENAI_API_KEY=*** run",
    "AWS_SECRET_ACCESS_KEY='a b' run": "AWS_SECRET_ACCESS_KEY=*** run",
    "MY_TOKEN_2=abc": "MY_TOKEN_2=***",
    "db_password = abc": "db_password = ***",
    '{"api_key": "a\\"b c", "n": 1}': '{"api_key": ***, "n": 1}',
    "{'token': 'abc'}": "{'token': ***}",
    '{\\"api_key\\": \\"abc\\", \\"n\\": 1}': '{\\"api_key\\": ***, \\"n\\": 1}',
    '{"api_key": "abc': '{"api_key": ***',
    "key sk-proj-a1_b2-c3d4 here": "key *** here",
    "hf_AbCdEfGhIjKlMnOp": "***",
    **{f"in {kind}_AbCdEfGhIj.": "in ***." for kind in ("gho", "ghp", "ghr", "ghs", "ghu")},
    "github_pat_11AbC_dEfGhI": "***",
    "AKIAIOSFODNN7EXAMPLE": "***",
    "--hf-token 'two words' --port 1": "--hf-token *** --port 1",
    '--hf-token "two words"': "--hf-token ***",
    "--api-key abc def": "--api-key *** def",
    "--api-key=abc def": "--api-key=*** def",
    "--rollout-args=--api-key abc": "--rollout-args=--api-key ***",
    "Authorization: Bearer abcdefgh": "Authorization: Bearer ***",
    "SUPER_TOKEN=abc": "SUPER_TOKEN=***",
    'PASSWORD=a#b"c:d run': "PASSWORD=*** run",
    "Authorization: Basic bWU6cGFzcw==": "Authorization: Basic ***",
    "FTP_PASSWD=abc": "FTP_PASSWD=***",
    "--passphrase abc": "--passphrase ***",
    "{'credential': 'abc', 'credentials': 'def'}": "{'credential': ***, 'credentials': ***}",
    "https://me:pass@host/x": "https://***@host/x",
    "served:https://token@host:80": "served:https://***@host:80",
    "https://host/b/x.jsonl?sig=abc%2F&se=1 next": "https://host/b/x.jsonl?*** next",
    "s3://b/x?X-Amz-Signature=abc#part": "s3://b/x?***#part",
    "https://host/#access_token=abc": "https://host/#access_token=***",
    "http://host/?key=abc: no answer": "http://host/?***: no answer",
    "--api-key=abc: there is no such option": "--api-key=***: there is no such option",
    "--api-key abc: there is no such option": "--api-key ***: there is no such option",
    "not 'token=5' but": "not 'token=***' but",
}
HARMLESS = (
    *(
        "--hf-token --port 1",
        "--max-new-tokens 5",
        "--budget-per-token 5",
        "nats_per_token=5",
        "--stop-tokens=<|im_end|>",
        "--tokenizer gpt2",
        "--ssl-keyfile a.pem",
    ),
    *("--teacher-token-file t.txt", "--stop-token-ids 1", "task-and-something-long", "hf_transfer", "KeyError: 'abc'"),
    *("pip install 'monkey==1.2'", "https://host:80/x@v1", "is it so? yes", '{"max_new_tokens": 5}', ""),
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_masked(text: str) -> None:
    assert public(text) == SECRETS[text] == public(SECRETS[text])


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert public(text) == text


def test_words_of_a_command() -> None:
    words = ["--api-key", "a b", "--steps", "3", "--hf-token", "--x", "TOKEN=abc"]
    assert public_words(words) == ["--api-key", "***", "--steps", "3", "--hf-token", "--x", "TOKEN=***"]
    assert public_words(["--api-key", "", "--token", "--key=a"]) == ["--api-key", "", "--token", "--key=***"]
    assert shlex.join(public_words(["--args", "--key 'a b' c"])) == "--args '--key *** c'"


def test_values_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {
        "args": {"api_key": "abc", "max_tokens": 3, "key": ""},
        "urls": ("https://a:b@h", 1),
        "at": "/home/somebody/x",
    }
    shown = {"args": {"api_key": "***", "max_tokens": 3, "key": ""}, "urls": ["https://***@h", 1], "at": "~/x"}
    assert masked(given) == shown
    assert masked(given, without_secrets) == shown | {"at": "/home/somebody/x"}


def test_a_secret_of_any_kind() -> None:
    given = {
        "api_keys": ["a", "b"],
        "api_key": {"of": "a"},
        "token": 4711,
        "args": ["--api-key", "a", "--hf-token", 4711, "--key", "--port", 1, "--password"],
    }
    shown = {
        **{"api_keys": "***", "api_key": "***", "token": "***"},
        "args": ["--api-key", "***", "--hf-token", "***", "--key", "--port", 1, "--password"],
    }
    assert masked(given) == masked(shown) == shown
    none = {"budget_per_token": True, "api_key": None, "token": 0, "key": [], "keys": {}, "args": ["--key", "", False]}
    assert masked(none) == none


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert public(
        "in /home/somebody/x, /home/somebody. Not /home/somebody2, /home/somebody.old or /mnt/home/somebody"
    ) == ("in ~/x, ~. Not /home/somebody2, /home/somebody.old or /mnt/home/somebody")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert public(f"{tmp_path}/link/a {tmp_path}/real/b {tmp_path}/other") == f"~/a ~/b {tmp_path}/other"
    for nowhere in ("/", "", "x"):
        monkeypatch.setenv("HOME", nowhere)
        assert public("in /x, x/y.") == "in /x, x/y."


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert home() is None and public("/home/x TOKEN=a") == "/home/x TOKEN=***"
