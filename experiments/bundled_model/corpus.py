"""Text domains of the bundled model: reading, splitting and hashing the training corpus.

A *document* is the unit that is held out: an encyclopaedia article, a scene's worth of verse, a
worked problem, a source file, a reasoning transcript, a stretch of one language. Every twentieth
document of a domain, in a seeded order, is held out and never trained on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeless.errors import UserError

HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class Domain:
    """One kind of text: where it comes from, its licence, and its share of the training rows."""

    name: str
    file: str | None
    origin: str
    licence: str
    weight: float
    split: Callable[[str], list[str]]


@dataclass(frozen=True)
class DomainText:
    """Documents of one domain after the split."""

    domain: Domain
    train: list[str]
    held_out: list[str]
    sha256: str
    bytes: int


def _articles(text: str) -> list[str]:
    """WikiText marks an article by a heading with single equals signs on its own line."""
    parts = re.split(r"\n(?= = [^=\n]+ = \n)", text)
    return [part.strip() + "\n" for part in parts if len(part.strip()) > 200]


def _group(pieces: list[str], separator: str, size: int) -> list[str]:
    """Pieces joined to documents of ``size`` characters or a little more."""
    groups: list[list[str]] = [[]]
    for piece in pieces:
        if sum(map(len, groups[-1])) >= size:
            groups.append([])
        groups[-1].append(piece)
    return [separator.join(group) + "\n" for group in groups if group]


def _problems(text: str) -> list[str]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    # the source's calculator marks, <<48/2=24>>, are not prose and would not be prompted for
    return [f"Question: {row['question']}\nAnswer: {re.sub(r'<<[^>]*>>', '', row['answer'])}\n" for row in rows]


def _languages(text: str) -> list[str]:
    documents: list[str] = []
    for part in re.split(r"(?m)^## \S+$", text):
        lines = [line.strip() for line in part.splitlines() if line.strip()]
        documents.extend(_group(lines, "\n", 1200))
    return documents


def _paragraphs(size: int) -> Callable[[str], list[str]]:
    """Speeches or thoughts, grouped to about ``size`` characters so that a document holds a dialogue."""
    return lambda text: _group(text.split("\n\n"), "\n\n", size)


DOMAINS: tuple[Domain, ...] = (
    Domain("encyclopaedia", "wikitext2-valid-test.txt", "WikiText-2, validation and test", "CC-BY-SA", 0.22, _articles),
    Domain(
        "verse",
        "tinyshakespeare.txt",
        "Shakespeare's plays (tinyshakespeare)",
        "public domain",
        0.16,
        _paragraphs(2000),
    ),
    Domain("mathematics", "gsm8k-train.jsonl", "openai/grade-school-math, train", "MIT", 0.18, _problems),
    Domain("python", None, "the Python standard library's sources", "PSF-2.0", 0.22, lambda text: [text]),
    Domain(
        "reasoning",
        "gpt-oss-20b-outputs.txt",
        "AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, generated text",
        "Apache-2.0",
        0.13,
        _paragraphs(1500),
    ),
    Domain(
        "languages",
        "udhr-multilingual.txt",
        "Universal Declaration of Human Rights in 29 languages",
        "United Nations, free to reproduce",
        0.09,
        _languages,
    ),
)


def python_sources() -> list[tuple[str, str]]:
    """(relative name, text) of the running Python's standard library, tests left out, in name order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "encodings"}
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            try:
                sources.append((relative.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return sources


def load(data: Path, seed: int = 0) -> list[DomainText]:
    """Read every domain and hold documents out.

    Raises:
        UserError: a file of the corpus is missing.
    """
    texts = []
    for index, domain in enumerate(DOMAINS):
        if domain.file is None:
            sources = python_sources()
            documents = [text for _, text in sources if text.strip()]
            blob = "".join(name + "\0" + text for name, text in sources).encode()
        else:
            path = data / domain.file
            if not path.is_file():
                raise UserError(f"{path} does not exist; the corpus needs the text file {domain.file}")
            blob = path.read_bytes()
            documents = domain.split(blob.decode("utf-8"))
        order = np.random.default_rng([seed, index]).permutation(len(documents))
        held = max(1, round(HELD_OUT_FRACTION * len(documents)))
        texts.append(
            DomainText(
                domain=domain,
                train=[documents[i] for i in sorted(order[held:])],
                held_out=[documents[i] for i in sorted(order[:held])],
                sha256=hashlib.sha256(blob).hexdigest(),
                bytes=len(blob),
            )
        )
    return texts


def python_version() -> str:
    """The version whose standard library was read."""
    return platform.python_version()
