"""Prompts by source: the bundled file, a local file, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeless.errors import UserError
from moeless.workloads.prompt_sources import bundled_prompts, read_hub, read_local, source_kind

#: First user turn of a conversation, or all of it up to the last user turn.
Turns = Literal["first", "whole"]

#: Columns tried in this order where the user names none.
TEXT_COLUMNS = (
    "prompt",
    "conversations",
    "conversation",
    "messages",
    "turns",
    "question",
    "instruction",
    "text",
    "input",
    "content",
)
CATEGORY_COLUMNS = ("category", "task", "subject", "topic", "language")
ID_COLUMNS = ("id", "conversation_id", "conversation_hash", "question_id", "task_id", "uid")
_USER_ROLES = ("human", "user", "prompter")
_ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """What one request asks: text, its category ("" where unknown), its identity in the source."""

    text: str
    category: str
    source_id: str


def load(
    source: str | Path | None = None,
    *,
    column: str | None = None,
    category_column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    turns: Turns = "first",
    max_requests: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Load prompts.

    Columns of conversations are read in the layouts of ShareGPT (``from``, ``value``), LMSYS-Chat-1M
    and WildChat (``role``, ``content``), and as plain lists of turns. Rows without any text are skipped.

    Args:
        source: None or ``bundled``, a local .jsonl, .json, .csv, .tsv, .txt or .parquet file, a folder of
            such files, or a hub id such as ``lmsys/lmsys-chat-1m``.
        column: the text or conversation; found by name where None.
        category_column: the category; one of ``CATEGORY_COLUMNS`` where None and present.
        subset, split: configuration and split of a hub data set; default configuration, ``train``.
        turns: what of a conversation becomes the prompt.
        max_requests: how many prompts, drawn without replacement by ``seed``, in the drawn order;
            None gives all, in the source's order.

    Raises:
        UserError: the source cannot be read, lacks the column, or holds no prompt.
    """
    if max_requests is not None and max_requests < 1:
        raise UserError(f"the number of requests must be at least 1, got {max_requests}")
    if turns not in ("first", "whole"):
        raise UserError(f"turns must be 'first' or 'whole', got {turns!r}")
    kind = source_kind(source)
    if kind != "hub" and (subset or split):
        raise UserError(f"{source or 'the bundled file'} has no subset or split; only hub data sets do")
    rows: Iterable[tuple[str, dict[str, Any]]]
    if kind == "bundled":
        name, rows = "the bundled prompts", read_local(bundled_prompts())
    elif kind == "local":
        name, rows = str(source), read_local(Path(str(source)).expanduser())
    else:
        name, rows = str(source), read_hub(str(source), subset, split)
    prompts = list(_to_prompts(rows, name, column, category_column, turns))
    if not prompts:
        raise UserError(f"{name} holds no prompt: every row is empty")
    if max_requests is not None and max_requests < len(prompts):
        chosen = np.random.default_rng((seed, 0x9807)).permutation(len(prompts))[:max_requests]
        prompts = [prompts[index] for index in chosen]
    return prompts


def _to_prompts(
    rows: Iterable[tuple[str, dict[str, Any]]],
    name: str,
    column: str | None,
    category_column: str | None,
    turns: Turns,
) -> Iterator[Prompt]:
    for index, (where, row) in enumerate(rows):
        if column is None:
            column = next((known for known in TEXT_COLUMNS if known in row), None)
            if column is None:
                raise UserError(
                    f"{name} has no column known to hold prompts among {_names(row)}; name one with the column option"
                )
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; it has {_names(row)}")
        if category_column is not None and category_column not in row:
            raise UserError(f"{where} has no column {category_column!r}; it has {_names(row)}")
        text = _text(row[column], turns, where, column)
        if not text.strip():
            continue
        if category_column is not None:
            category = row[category_column]
        else:
            category = next((row[known] for known in CATEGORY_COLUMNS if isinstance(row.get(known), str)), "")
        identity = next((row[known] for known in ID_COLUMNS if row.get(known) is not None), index)
        yield Prompt(text, "" if category is None else str(category), str(identity))


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _text(value: Any, turns: Turns, where: str, column: str) -> str:
    """The prompt in one cell: a string, a list of turns, or a conversation."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(turn, str) for turn in value):
        # the user's turns alone (MT-Bench, Spec-Bench)
        return (value[0] if turns == "first" else "\n\n".join(value)) if value else ""
    if isinstance(value, (list, tuple)) and all(isinstance(turn, dict) for turn in value):
        spoken = [_turn(turn, where, column) for turn in value]
        asked = [index for index, (role, _) in enumerate(spoken) if role == "user"]
        if not asked:
            return ""
        if turns == "first":
            return spoken[asked[0]][1]
        return "\n\n".join(f"{role}: {text}" for role, text in spoken[: asked[-1] + 1])
    raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not a text or a conversation")


def _turn(turn: dict[str, Any], where: str, column: str) -> tuple[str, str]:
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if role_key in turn and text_key in turn:
            role = str(turn[role_key]).lower()
            return "user" if role in _USER_ROLES else _ROLE_NAMES.get(role, role), str(turn[text_key] or "")
    raise UserError(f"{where}: a turn of column {column!r} has neither 'from' and 'value' nor 'role' and 'content'")
