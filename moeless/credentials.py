"""Hides passwords, keys and tokens in whatever is kept or shown: command lines, configurations, messages.

What counts as secret: the password of an address (``user:password@host``), the values of options, query parameters,
environment variables and fields whose names say so (``--api-key``, ``?sslpassword=``, ``WANDB_API_KEY=``), and tokens
of a known form (``hf_...``). Where a text leaves doubt, more is hidden rather than less. A bare run of 40 hexadecimal
digits may be a git revision and stays, unless its name says that it is a key.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"

#: Last words of a name whose value is a secret, whatever its type.
_SECRET: tuple[str, ...] = (
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "secret",
    "secrets",
    "credential",
    "credentials",
)
_SECRET += ("apikey", "accesskey", "secretkey", "privatekey", "authtoken", "accesstoken")
#: Last words whose value is a secret where it is a text; numbers under them mean something else.
_SECRET_TEXT = ("token", "signature", "sig", "authorization", "auth", "pwd")
#: What makes a key a secret one, as in ``api_key``.
_KEYS = {
    "api",
    "access",
    "secret",
    "private",
    "auth",
    "account",
    "signing",
    "encryption",
    "service",
    "license",
    "wandb",
}
#: Words before ``token`` that speak of a text's tokens.
_TEXTS = {"per", "eos", "bos", "pad", "unk", "sep", "cls", "mask", "next", "first", "last", "output", "input", "each"}
_TEXTS |= {"every", "prompt", "special", "a", "one", "the", "new", "image"}

_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_NUMBER = re.compile(r"[-+]?[\d.,:]+(?:[eE][-+]?\d+)?%?")

_SCHEME = r"[\w+.-]+://"
#: Where an address ends: at the closing quote where one opens before it, else at white space.
_ADDRESS = re.compile(
    "|".join(rf"(?<={q}){_SCHEME}.{{0,2000}}?(?={q}(?:[\s,;:.)\]}}][^\s@]*(?:\s|$)|$))" for q in "'\"")
    + rf"|(?<![\w+.-]){_SCHEME}\S+"
)
_PORT = re.compile(r":(?:\d{1,5}(?=[\s/:,;?])|(?=\s))")
_BARE = re.compile(r"(?<![^\s'\"=(,])([\w.+-]+:)(?!//)([^\s@]+)@(?=[\w\[])(?!sha256:)")
_AFTER = r"(?=[\"')\]}>,.;:]*(?:[\s&]|$))"
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_VALUE = re.compile(rf"(?:{_QUOTED}){_AFTER}|[^\s&]+")
_START, _NAME = re.compile(_SCHEME), re.compile(r"[\w.-]+")
_MARKS = ("'", '"')
_CLOSING = "\"')]}>,.;:"
#: What stands before a value: ``name=``, ``"name":``, ``name:`` and ``--name``.
_ASSIGNED = re.compile(r"([?&;]?)(?<![\w.-])([\w.-]+)\s?=\s?")
_FIELD = re.compile(r"([\"'])([\w.-]+)\1\s*:\s*")
_HEADER = re.compile(r"(?<![\w./-])([A-Za-z][\w-]*):\s*")
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w.-]*\s+")
_FIELD_VALUE = re.compile(rf"{_QUOTED}|[^\s,}}\]]+")
_HEADER_VALUE = re.compile(rf"(?:(?:Bearer|Basic|Token|Digest)\s+)?(?:{_VALUE.pattern})")
_OPTION_VALUE = re.compile(rf"(?:{_QUOTED}|'[^']*'|[^\s'\"])+|\S+")
_NOTHING = ("null", "None", "true", "false", "True", "False")
_BEARER = re.compile(r"\b([Bb]earer\s+)([\w.~+/=-]{8,})")
#: A W&B key in a sentence; elsewhere such digits are a revision.
_KEY_TEXT = re.compile(r"((?i:\bkey\b)\W{1,4})([0-9a-f]{40})(?![0-9a-f])")
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_(?:[A-Za-z0-9]{30,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,})|gh[pousr]_\w{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|wandb_v1_\w{16,}|local-[0-9a-f]{40}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)


def mask(text: str, beside: Sequence[str] = ()) -> str:
    """The text without its secrets; masking twice changes nothing more.

    Args:
        text: an address, an argument, a message of any length.
        beside: a command line or addresses, whose secrets are hidden in the text wherever they stand: a library's
            message may quote a password alone.
    """
    found: list[str] = []
    for index, argument in enumerate(beside):
        _argument(argument, beside[index - 1] if index else "", found)
    for secret in sorted(_spellings(found), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _mask(text, [])


def mask_command(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets: the values of options that hold keys, and what :func:`mask` finds."""
    return [_argument(argument, arguments[i - 1] if i else "", []) for i, argument in enumerate(arguments)]


def mask_json(value: Any) -> Any:
    """A configuration without its secrets: fields whose names say so, and what :func:`mask` finds in texts."""
    if isinstance(value, str):
        return _argument(value, "", [])
    if isinstance(value, Mapping):
        return {mask(key) if isinstance(key, str) else key: _field(key, entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(entry, str) for entry in value):
            return mask_command(value)
        return [mask_json(entry) for entry in value]
    return value


def command_line(program: str, arguments: Sequence[str]) -> str:
    """The line to type again, for a shell, without its secrets."""
    return shlex.join([program, *mask_command(arguments)])


def names_secret(name: str, value: Any = "text", alone: bool = False) -> bool:
    """Whether a field, option, parameter or variable of that name holds a secret.

    Args:
        value: what it holds; a number is no ``token``.
        alone: ``key`` by itself counts, as it does in an address and as an option.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or value is None or isinstance(value, bool) or value == "":
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    variable = name.isupper() and "_" in name
    if last.endswith(_SECRET):
        return True
    if last in ("key", "keys"):
        return before in _KEYS or variable or (alone and not before)
    if last == "pass":
        return variable or before in ("db", "user")
    if last not in _SECRET_TEXT or not isinstance(value, str):
        return False
    return not (last == "token" and before in _TEXTS) and not (last == "pwd" and value.startswith("/"))


def _field(name: Any, value: Any) -> Any:
    return MASK if isinstance(name, str) and names_secret(name, value) else mask_json(value)


def _argument(argument: str, before: str, found: list[str]) -> str:
    if before.startswith("-") and "=" not in before and names_secret(before, argument, alone=True):
        return _hide(argument, found)
    name, equals, value = argument.partition("=")
    if equals and _NAME.fullmatch(name):
        if names_secret(name, value, alone=name.startswith("-")):
            return f"{name}={_hide(value, found)}"
        return f"{name}={_argument(value, '', found)}" if name.startswith("-") else _mask(argument, found)
    # white space within is part of the address
    return _mask(_address(argument, found, whole=True) if _START.match(argument) else argument, found)


def _spellings(secrets: Sequence[str]) -> set[str]:
    """Secrets as they stand, decoded and encoded; very short ones would hide half of a message."""
    made = set(secrets)
    for secret in secrets:
        for plain in (unquote(secret), unquote_plus(secret)):
            made |= {plain, quote(plain, safe=""), quote(plain, safe=" +"), quote_plus(plain)}
    return {secret for secret in made if len(secret) >= 4 and secret.strip("*")}


def _hide(secret: str, found: list[str]) -> str:
    found.append(secret)
    return MASK


def _mask(text: str, found: list[str]) -> str:
    """What one pass left may show another secret; a few passes end it."""
    for _ in range(10):
        before, text = text, _once(text, found)
        if text == before:
            break
    return text


def _once(text: str, found: list[str]) -> str:
    if "://" in text:
        if _START.match(text):
            text = _address(text, found)
        text = _ADDRESS.sub(
            lambda match: _address(match[0], found, match.string[max(0, match.start() - 1) : match.start()] in _MARKS),
            text,
        )
    if "@" in text:
        text = _BARE.sub(lambda match: f"{match[1]}{_hide(match[2], found)}@", text)
    if "=" in text:
        text = _hide_after(_ASSIGNED, _VALUE, _assigned, text, found)
    if ":" in text:
        text = _hide_after(_FIELD, _FIELD_VALUE, _field_name, text, found)
        text = _hide_after(_HEADER, _HEADER_VALUE, _header, text, found)
    if "-" in text:
        text = _hide_after(_OPTION, _OPTION_VALUE, _option, text, found)
    text = _KEY_TEXT.sub(lambda match: match[1] + _hide(match[2], found), text)
    text = _BEARER.sub(lambda match: match[1] + _hide(match[2], found), text)
    return _TOKENS.sub(lambda match: _hide(match[0], found), text)


def _address(address: str, found: list[str], whole: bool = False) -> str:
    """One address without the password before its host; ``whole`` where it surely ends with the text."""
    if whole and "?" in address:
        place, _, query = address.partition("?")
        query = "&".join(_parameter(entry, found) for entry in query.split("&"))
        address = f"{place}?{query}"
    scheme, _, rest = address.partition("://")
    web = scheme.lower().rpartition("+")[2] in ("http", "https")
    user = re.match(r"[^\s:/?#\[]*", rest)
    end = user.end() if user else 0
    # after a port, and in a sentence, the address ends at white space
    at = (rest.split(maxsplit=1)[:1] or [""])[0].rfind("@") if _PORT.match(rest, end) else rest.rfind("@")
    if at >= end and rest[end : end + 1] == ":":
        # a token may stand in either place of a web address
        shown = "" if web else rest[: end + 1]
        if web and end:
            _hide(rest[:end], found)
        return f"{scheme}://{shown}{_hide(rest[end + 1 : at], found)}{rest[at:]}"
    if web and 0 < at <= end:
        return f"{scheme}://{_hide(rest[:at], found)}{rest[at:]}"
    if rest[end : end + 1] == ":":
        # no host follows: it was forgotten, or the message was cut
        port = re.match(r"[^\s/?#,;:)\]}'\"<>]*", rest[end + 1 :])
        word = port[0] if port else ""
        if word and not word.isdigit() and word.lower().strip("{$}") != "port":
            return f"{scheme}://{rest[: end + 1]}{_hide(word, found)}{rest[end + 1 + len(word) :]}"
    return address


def _parameter(entry: str, found: list[str]) -> str:
    name, _, value = entry.partition("=")
    return f"{name}={_hide(value, found)}" if names_secret(name, value, alone=True) else entry


def _hide_after(
    head: re.Pattern[str],
    value: re.Pattern[str],
    secret: Callable[[re.Match[str], str], bool],
    text: str,
    found: list[str],
) -> str:
    """Hide the values that follow a head that names a secret."""
    parts, end = [], 0
    for match in head.finditer(text):
        if match.start() < end or not secret(match, "text"):
            continue
        held = value.match(text, match.end())
        shown = held[0] if held else ""
        if shown[:1] not in _MARKS:
            # a sentence or a list goes on after the value
            shown = shown.rstrip(_CLOSING)
        if secret(match, shown):
            parts += [text[end : match.end()], _hide_quoted(shown, found)]
            end = match.end() + len(shown)
    return "".join([*parts, text[end:]])


def _assigned(head: re.Match[str], value: str) -> bool:
    if head[1] or head[2].startswith("-"):
        return names_secret(head[2], _bare(value), alone=True)
    return _speaks_of_secret(head[2], value)


def _field_name(head: re.Match[str], value: str) -> bool:
    return value not in _NOTHING and _speaks_of_secret(head[2], value)


def _header(head: re.Match[str], value: str) -> bool:
    """Sentences speak of a token: a text, too; headers have longer names."""
    compound = re.search(r"[-_]", head[1]) is not None or head[1].lower() == "authorization"
    return names_secret(head[1], 0) or (compound and _speaks_of_secret(head[1], value))


def _speaks_of_secret(name: str, value: str) -> bool:
    """In a text, a number without quotes may count tokens."""
    return names_secret(name, 0 if _NUMBER.fullmatch(value) else _bare(value))


def _option(head: re.Match[str], value: str) -> bool:
    return names_secret(head[0], _bare(value), alone=True)


def _bare(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] in _MARKS and value[-1] == value[0] else value


def _hide_quoted(value: str, found: list[str]) -> str:
    inner = _bare(value)
    return value[0] + _hide(inner, found) + value[0] if inner is not value else _hide(value, found)
