"""No password, key or token is kept or shown; what only looks like one stays."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeless.credentials import MASK, command_line, mask, mask_command, mask_json

HEX = "0123456789abcdef0123456789abcdef01234567"

#: What people use as passwords, long enough not to stand in an address by chance.
SECRETS = st.text(st.sampled_from("abcXYZ019@/:?#&=%+-_.,;!$*()[]{}<>|^~\\'\" "), min_size=8, max_size=20).filter(
    lambda text: sum(letter.isalnum() for letter in text) >= 4
)
#: Those that stand in an address as they are.
RAW = SECRETS.filter(lambda text: " " not in text and text.strip("@/:?#&='\".,;()[]{}<>") == text)
NAMES = st.sampled_from(
    ("password", "sslpassword", "api_key", "api-key", "apiKey", "token", "hf-token", "access_token")
)
NAMES |= st.sampled_from(("secret", "passwd", "client-secret", "sig", "pwd", "X-Amz-Signature", "X-Amz-Security-Token"))
OPTIONS = st.sampled_from(["--api-key", "--token", "--password", "--secret", "--hf-token", "--wandb-api-key", "--key"])
SCHEMES = st.sampled_from(["postgresql", "mysql+pymysql", "redis", "s3", "https", "http", "sqlite"])


def _parts(secret: str) -> set[str]:
    """A secret and the long pieces that would give it away."""
    return {secret, quote(secret, safe="")} | {piece for piece in (secret[:6], secret[-6:]) if piece.isalnum()}


@given(SCHEMES, RAW, st.sampled_from(["{}", "see {}, then go on", "cannot open '{}': gone", "({})", '"{}" x@y']))
@example("postgresql", "p@ss/w:rd", "cannot open '{}': gone")
def test_the_password_of_an_address_is_hidden_raw_or_encoded(scheme: str, secret: str, sentence: str) -> None:
    for written in (secret, quote(secret, safe="")):
        text = sentence.format(f"{scheme}://someone:{written}@host.org:5432/db")
        shown = mask(text)
        assert not any(part in shown for part in _parts(secret))
        assert "host.org:5432/db" in shown
        assert mask(shown) == shown


# digits first read as a port, after which white space ends the address
@given(SECRETS.filter(lambda text: not text[0].isdigit() and not text[0].isspace()), SCHEMES)
def test_white_space_in_an_argument_s_password_hides_no_less(secret: str, scheme: str) -> None:
    address = f"{scheme}://someone:{secret}@host/db"
    for arguments in (["--storage", address], [f"--storage={address}"]):
        shown = " ".join(mask_command(arguments))
        assert secret not in shown
        assert shown.endswith("@host/db")
    assert secret not in mask_json({"storage": address})["storage"]


@given(NAMES, RAW)
def test_query_parameters_that_hold_a_secret_are_hidden(name: str, secret: str) -> None:
    written = quote(secret, safe="")
    shown = mask(f"sqlite:////tmp/x.db?mode=rw&{name}={written}&timeout=5")
    assert shown == f"sqlite:////tmp/x.db?mode=rw&{name}={MASK}&timeout=5"
    assert mask(shown) == shown


@given(OPTIONS, SECRETS, st.sampled_from([(), ("--quick",), ("--policy", "moeless:history:1")]))
def test_the_values_of_options_that_hold_keys_are_hidden(option: str, secret: str, before: tuple[str, ...]) -> None:
    assert mask_command([*before, option, secret, "--seed", "1"]) == [*before, option, MASK, "--seed", "1"]
    assert mask_command([*before, f"{option}={secret}", "--seed=1"]) == [*before, f"{option}={MASK}", "--seed=1"]
    shown = command_line("moeless", [*before, option, secret])
    assert shlex.split(shown) == ["moeless", *before, option, MASK]
    assert secret not in mask(shlex.join(["moeless", *before, option, secret]))


@given(NAMES.filter(lambda name: name != "pwd"), SECRETS)
def test_fields_whose_names_say_so_are_hidden_in_configurations_and_their_text(name: str, secret: str) -> None:
    config = {"rate": 2.0, "nested": [{name: secret}], "url": "http://host:80/path"}
    hidden = {"rate": 2.0, "nested": [{name: MASK}], "url": "http://host:80/path"}
    assert mask_json(config) == hidden
    assert mask_json(hidden) == hidden
    assert json.loads(mask(json.dumps({"a": {name: secret}}))) == {"a": {name: MASK}}


@given(st.text())
def test_masking_twice_changes_nothing_more(text: str) -> None:
    shown = mask(text)
    assert mask(shown) == shown


@given(
    st.lists(st.sampled_from(["password", "token=", "://", "@", ":", "'", '"', "a", " ", "--", "?", "&", "***", "="]))
)
def test_masking_twice_changes_nothing_more_where_much_looks_like_a_secret(words: list[str]) -> None:
    shown = mask("".join(words))
    assert mask(shown) == shown
    arguments = mask_command(words)
    assert mask_command(arguments) == arguments


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"WANDB_API_KEY={HEX} moeless tune x", "WANDB_API_KEY=*** moeless tune x"),
        ("HF_TOKEN='a b' PGPASSWORD=x", "HF_TOKEN='***' PGPASSWORD=***"),
        (f"the API key {HEX} is not known", "the API key *** is not known"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
        ("sent Bearer abcdefghijk", "sent Bearer ***"),
        ("hf_" + "aB3" * 11 + "x was refused", "*** was refused"),
        ("https://ghp_x@github.com/a/b", "https://***@github.com/a/b"),
        ("host=h user=u password=p dbname=d", "host=h user=u password=*** dbname=d"),
        ("postgresql://user:secret", "postgresql://user:***"),
        ("postgresql://me@corp.org:secret@host/db", "postgresql://me@corp.org:***@host/db"),
        ("user:secret@host/db", "user:***@host/db"),
        ("redis://:secret@host", "redis://:***@host"),
        ("{'password': 'a, b', 'n': 1}", "{'password': '***', 'n': 1}"),
        ("https://bucket/x?X-Amz-Date=1&X-Amz-Signature=ab", "https://bucket/x?X-Amz-Date=1&X-Amz-Signature=***"),
        ("https://host/x?key=abc", "https://host/x?key=***"),
    ],
)
def test_keys_and_tokens_in_sentences_are_hidden(text: str, shown: str) -> None:
    assert mask(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/data/traces/gpt-oss/trace.json",
        "C:\\data\\trace",
        "moeless:history:auto",
        "planner:predictor:1",
        "poisson:4",
        "slots=1:8:log",
        "ttft:500",
        "openai/gpt-oss-20b",
        "org/model@main",
        "2026-01-31T00:00:00+00:00",
        "00:00",
        "a" * 64,
        f"git {HEX}",
        f"revision={HEX}",
        f"https://github.com/a/b/tree/{HEX}",
        "http://127.0.0.1:8080/v1",
        "tcp://host:29500 does not answer, ask a@b.org",
        "tcp://host: no answer, ask a@b.org",
        "tcp://HOST:PORT",
        "http://[::1]:80/a@b",
        "sqlite:////tmp/studies.db?timeout=10",
        "--token-budget 2048 --max-new-tokens 8 --tokens=5",
        "1.5 ms per token: 3 tokens, per_token=2.5, eos_token=</s>",
        "sort by key=value pairs, cache_key: x",
        "PWD=/home/someone",
        "hf_model.py and hf_spec",
        "mail me@host.org",
        "image:tag@sha256:" + "a" * 64,
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text
    assert mask_command(["--option", text, f"--option={text}"]) == ["--option", text, f"--option={text}"]
    assert mask_json({"option": text, "list": [text, 1]}) == {"option": text, "list": [text, 1]}


@pytest.mark.parametrize(
    "value", [{"token": 5, "tokens": [1, 2], "password": None, "secret": ""}, {"key": "x", "api": True}, [1, "a"], 3.5]
)
def test_numbers_and_empty_fields_stay(value: Any) -> None:
    assert mask_json(value) == value


@pytest.mark.parametrize("quoted", ["invalid literal: 'p@ss w'", "no host p%40ss%20w", "no host p%40ss w"])
def test_a_library_s_message_shows_no_secret_of_the_command_line(quoted: str) -> None:
    shown = mask(quoted, ["tune", "--storage", "postgresql://user:p%40ss%20w@host/db"])
    assert MASK in shown
    assert "ss" not in shown
    assert "hunter22" not in mask("refused: hunter22", ["--password", "hunter22"])
    assert "hunter22" not in mask("refused: hunter22", ["--token=hunter22"])
