"""A crash leaves the old file or the new one, and a refusal leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeless.errors import UserError
from moeless.files import check_writable, folder_atomic, read_json, write_atomic, write_json


def test_a_failed_write_keeps_the_old_content_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(target, fails)
    assert read_json(target) == {"old": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with folder_atomic(tmp_path / "out") as folder:
            (folder / "part").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with folder_atomic(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
    assert (tmp_path / "out" / "part").read_text() == "x"


def test_a_full_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="already exists"), folder_atomic(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_writable(tmp_path / "file" / "out")


def test_not_a_number_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ("{", "not valid JSON"), ("\xff", "JSON")])
def test_unreadable_json_is_one_sentence(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        read_json(path)
