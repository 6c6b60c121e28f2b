"""A result with four policies under two cost models, and a headless browser where there is one."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moeless.metrics.result import Billing, Cell, LayerMetrics, Result


def make_cell(policy: str, mean_ms: float, **changes) -> Cell:
    """A cell whose layer time is ``mean_ms`` and whose bills follow from it."""
    parts = {"expert": 0.6 * mean_ms, "all_to_all": 0.3 * mean_ms, "control": 0.1 * mean_ms}
    cdf = tuple(mean_ms * (0.5 + i / 100) for i in range(101))
    layer = LayerMetrics(
        mean_ms, mean_ms, 1.5 * mean_ms, 1.3, 36.0, 1e9, 0.97, {}, samples=4800, parts_ms=parts, cdf_ms=cdf
    )
    planner, _, predictor = policy.partition(":")
    cell = Cell(
        policy=policy,
        predictor=predictor or "none",
        distance=1,
        model="gpt-oss-20b",
        trace_kind="tokens",
        cluster="h100x8",
        costs="roofline",
        evidence="simulated",
        layer=layer,
        request=None,
        billing=Billing(paper=10 * mean_ms, resident=1000.0, gpu_seconds=80.0, gpu_dollars=0.05),
        lossy=planner == "oracle",
    )
    return dataclasses.replace(cell, **changes)


@pytest.fixture(scope="session")
def result() -> Result:
    cells = []
    for costs, factor in (("paper", 1.0), ("roofline", 2.0)):
        for policy, mean in (("static", 2.0), ("eplb:history", 1.5), ("moeless:layer_aware:1", 1.0), ("oracle", 0.5)):
            cells.append(make_cell(policy, mean * factor, costs=costs))
    return Result("moeless serve-bench trace", tuple(cells))


Browser = Callable[..., dict]


def chromium() -> str:
    """The browser's program; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium to lay the page out")
    return program


@pytest.fixture
def printer(tmp_path: Path) -> Callable[[Path], bytes]:
    """``printer(page) -> PDF``."""
    program = chromium()

    def to_pdf(page: Path) -> bytes:
        target = tmp_path / "page.pdf"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer", f"--print-to-pdf={target}"]
        subprocess.run(
            [program, *flags, page.as_uri()],
            capture_output=True,
            timeout=120,
            check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        return target.read_bytes()

    return to_pdf


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """``browser(page, width, dark=False) -> {overflow, broken, console, ground, ink}`` of a page laid out that wide."""
    program = chromium()

    def look(page: Path, width: int, dark: bool = False) -> dict:
        folder = tmp_path_factory.mktemp("browser")
        # a window cannot be as narrow as a phone, a frame can
        probe = """<script>addEventListener("load", () => {
          const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
          const beyond = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .drawing, pre")
            && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + "." + e.className);
          const broken = [...page.images].filter(i => !i.complete || !i.naturalWidth).length;
          const drawn = [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 40).length;
          document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
          document.getElementById("found").textContent = JSON.stringify({
            overflow: root.scrollWidth - root.clientWidth, beyond: beyond, broken: broken, drawn: drawn,
            ground: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
            title: page.title});
        })</script>"""
        content = html.escape(page.read_text(encoding="utf-8"), quote=True)
        wrapper = folder / "frame.html"
        frame = f'<iframe srcdoc="{content}" style="width:{width}px;height:900px;border:0"></iframe>'
        wrapper.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{probe}</body>", encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
        flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        done = subprocess.run(
            [program, *flags, wrapper.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(folder)},
        )
        found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return {**json.loads(html.unescape(found[1])), "console": console}

    return look
