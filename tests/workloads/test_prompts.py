"""Prompts come out of every source as they are, and bad sources give one sentence."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeless.errors import UserError
from moeless.workloads import prompts
from moeless.workloads.prompts import Prompt, load

SHAREGPT = [
    {"id": "a1", "conversations": [{"from": "gpt", "value": "?"}, {"from": "human", "value": "Hello there"}]},
    {"id": "a2", "conversations": []},
    {
        "id": "a3",
        "conversations": [
            {"from": "human", "value": "One"},
            {"from": "gpt", "value": "Two"},
            {"from": "human", "value": "Three"},
            {"from": "gpt", "value": "Four"},
        ],
    },
]


def test_bundled_prompts_are_many_varied_and_distinct():
    bundled = load()
    assert len(bundled) >= 200
    families = Counter(prompt.category for prompt in bundled)
    assert len(families) >= 8
    assert {"code", "mathematics", "translation", "summarising", "dialogue", "extraction", "reasoning"} <= set(families)
    assert min(families.values()) >= 15
    normal = [re.sub(r"\W+", " ", prompt.text).strip().lower() for prompt in bundled]
    assert len(set(normal)) == len(bundled)
    assert len({prompt.source_id for prompt in bundled}) == len(bundled)
    # not one template filled many times: openings differ
    assert Counter(" ".join(text.split()[:4]) for text in normal).most_common(1)[0][1] <= 6
    words = sorted(len(prompt.text.split()) for prompt in bundled)
    assert words[len(words) // 10] <= 15
    assert sum(count >= 80 for count in words) >= 25
    assert len({prompt.category for prompt in bundled[:12]}) == 12, "neighbours are of different families"


def test_sampling_is_by_seed_and_without_replacement():
    drawn = load(max_requests=50, seed=3)
    assert drawn == load(max_requests=50, seed=3)
    assert drawn != load(max_requests=50, seed=4)
    assert len({prompt.source_id for prompt in drawn}) == 50
    assert drawn[:20] == load(max_requests=20, seed=3)
    assert load(max_requests=10_000) == load()


def test_sharegpt_gives_the_first_user_turn(tmp_path: Path):
    file = tmp_path / "share.json"
    file.write_text(json.dumps(SHAREGPT))
    assert load(file) == [Prompt("Hello there", "", "a1"), Prompt("One", "", "a3")]


def test_sharegpt_whole_conversation_ends_with_the_last_user_turn(tmp_path: Path):
    file = tmp_path / "share.json"
    file.write_text(json.dumps(SHAREGPT))
    assert load(file, turns="whole")[1].text == "user: One\n\nassistant: Two\n\nuser: Three"


def test_lmsys_layout_from_parquet(tmp_path: Path):
    rows = [
        {
            "conversation_id": "c9",
            "model": "m",
            "conversation": [{"content": "Bonjour", "role": "user"}, {"content": "Salut", "role": "assistant"}],
            "turn": 1,
            "language": "French",
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lmsys.parquet")
    assert load(tmp_path / "lmsys.parquet") == [Prompt("Bonjour", "French", "c9")]
    assert load(tmp_path / "lmsys.parquet", category_column="model")[0].category == "m"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"prompt": "x", "id": 7, "category": "k"}\n\n{"prompt": "y"}\n',
            [("x", "k", "7"), ("y", "", "1")],
        ),
        ("a.json", '{"rows": ["x", "y"]}', [("x", "", "0"), ("y", "", "1")]),
        ("a.csv", 'question,task\n"x, or ""z""",t\ny,u\n', [('x, or "z"', "t", "0"), ("y", "u", "1")]),
        ("a.tsv", "text\tcategory\nx\tc\n", [("x", "c", "0")]),
        ("a.txt", "first\n\n second \n", [("first", "", "1"), ("second", "", "3")]),
        ("a.jsonl", '{"question_id": 81, "category": "w", "turns": ["x", "again"]}\n', [("x", "w", "81")]),
    ],
)
def test_local_formats(tmp_path: Path, name: str, content: str, expected: list[tuple[str, str, str]]):
    (tmp_path / name).write_text(content)
    assert [(p.text, p.category, p.source_id) for p in load(tmp_path / name)] == expected


def test_a_folder_is_all_its_prompt_files(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "notes.md").write_text("no prompt")
    assert [prompt.text for prompt in load(tmp_path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is list"),
        ("a.jsonl", b'{"words": "x"}\n', "no column known to hold prompts among words"),
        ("a.jsonl", b'{"prompt": "x"}\n{"other": "y"}\n', "line 2 has no column 'prompt'"),
        ("a.jsonl", b'{"prompt": 3}\n', "holds int"),
        ("a.jsonl", b'{"conversation": [{"who": "me"}]}\n', "neither 'from' and 'value'"),
        ("a.json", b'{"a": 1}', "must hold a JSON list"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.csv", b"prompt\nx,y\n", "more cells than the header"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"\n\n", "holds no prompt"),
        ("a.parquet", b"PAR1 broken", "not a readable Parquet file"),
        ("a.docx", b"x", "is not a prompt file"),
    ],
)
def test_a_bad_file_gives_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./here", "two words", "a/b/c"])
def test_a_missing_source_is_named(source: str):
    with pytest.raises(UserError, match="does not exist"):
        load(source)


def test_wrong_options_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="at least 1"):
        load(max_requests=0)
    with pytest.raises(UserError, match="no subset or split"):
        load(split="test")
    with pytest.raises(UserError, match="no column 'nope'"):
        load(column="nope")
    with pytest.raises(UserError, match="no column 'nope'"):
        load(category_column="nope")


def test_a_hub_id_is_loaded_through_datasets(monkeypatch: pytest.MonkeyPatch):
    import datasets

    made = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"prompt": "p", "topic": "t"}, {"prompt": "q", "topic": "u"}])}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: asked.append((name, subset)) or made)
    assert load("owner/set", subset="main") == [Prompt("p", "t", "0"), Prompt("q", "u", "1")]
    assert asked == [("owner/set", "main")]
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        load("owner/set", split="train")


def test_an_unreachable_hub_gives_one_sentence(monkeypatch: pytest.MonkeyPatch):
    import socket

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match=r"cannot load data set 'nobody-here/no-such-set'.*local prompt file") as caught:
        load("nobody-here/no-such-set")
    assert "\n" not in str(caught.value)


def test_real_prompt_sets_load(shared_data: Path):
    spec_bench = load(shared_data / "prompts" / "spec-bench.jsonl")
    assert len(spec_bench) == 480
    assert len({prompt.category for prompt in spec_bench}) >= 6
    assert len(load(shared_data / "prompts" / "humaneval.jsonl")) == 164
    assert prompts.load(shared_data / "prompts" / "gsm8k-test.jsonl", max_requests=5)[0].text
