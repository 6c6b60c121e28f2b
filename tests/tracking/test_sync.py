"""``wandb sync`` takes an offline run's folder: everything in it reaches a server, here a stand-in on loopback."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moeless.tracking import find_runs, read_manifest, start_run

pytest.importorskip("wandb")

#: One short run in the working folder, under W&B's own settings.
PROGRAM = """
from moeless.tracking import start_run
with start_run("demo", "x", {"rate": 1}, 3) as run:
    run.log({"layer_ms": 1.25})
"""


class StandInServer(ThreadingHTTPServer):
    """Answers what W&B's uploader asks for, and remembers it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.uploads: dict[str, bytes] = {}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"name": "moeless", "entity": {"name": "me"}}
        name = given.get("name")
        collection = given.get("input", {}).get("artifactCollectionName")
        upload = f"http://127.0.0.1:{self.server_port}/upload/"
        files = [{"name": file, "uploadUrl": upload + file} for file in given.get("files", [])]
        made = {"id": f"id-of-{collection}", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "0"}}}
        return {
            "UpsertBucket": {
                "upsertBucket": {
                    "bucket": {"id": "b", "name": name, "displayName": name, "project": project},
                    "inserted": True,
                }
            },
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "CreateArtifact": {"createArtifact": {"artifact": made}},
            "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}},
            "UseArtifact": {"useArtifact": {"artifact": {"id": "used"}}},
        }.get(operation, {})


class Handler(BaseHTTPRequestHandler):
    """One request: GraphQL, a file stream, or an upload."""

    protocol_version = "HTTP/1.1"
    server: StandInServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: dict[str, Any] = {}
        if self.path.startswith("/graphql"):
            query = json.loads(body)
            given = query.get("variables") or {}
            self.server.asked.append((query["operationName"], given))
            reply = {"data": self.server.answer(query["operationName"], given)}
        else:
            self.server.uploads[self.path] = self.server.uploads.get(self.path, b"") + body
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server() -> Iterator[StandInServer]:
    made = StandInServer()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_an_offline_run_syncs_with_its_config_metrics_table_and_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: StandInServer
) -> None:
    program = Path(sys.executable).with_name("wandb")
    if not program.exists():
        pytest.skip("the wandb program is not installed beside Python")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trace = tmp_path / "trace"
    trace.mkdir()
    (trace / "trace.json").write_text("{}")
    with start_run("serve-bench", "x", {"rate": 1}, 3, [trace], tmp_path / "run") as run:
        run.log({"layer_ms": 1.25})
        run.write_result({"cells": [{"policy": "static"}]})
    manifest = read_manifest(tmp_path / "run")
    assert manifest["warnings"] == []

    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ERROR_REPORTING": "false",
    }
    done = subprocess.run(
        [program, "sync", folder], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Finished syncing" in done.stderr

    config = [json.loads(given["config"]) for name, given in server.asked if name == "UpsertBucket"][-1]
    assert config["config"]["value"] == {"rate": 1}
    made = {given["input"]["artifactCollectionName"] for name, given in server.asked if name == "CreateArtifact"}
    result = f"result-{manifest['outputs'][0]['sha256'][:16]}"
    source = f"trace-{manifest['inputs'][0]['sha256'][:16]}"
    assert {result, source} <= made
    # the run made the result and used the trace: that is the line W&B draws between runs
    assert [given["input"]["artifactID"] for name, given in server.asked if name == "UseArtifact"] == [
        f"id-of-{source}"
    ]
    streamed = b"".join(body for path, body in server.uploads.items() if path.endswith("/file_stream"))
    assert b'\\"layer_ms\\":1.25' in streamed
    assert any("media/table/result" in path for path in server.uploads)
    shutil.rmtree(folder)


def _run_elsewhere(folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own: W&B reads its settings once."""
    given = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    given = {name: value for name, value in given.items() if not name.startswith("WANDB_")}
    given |= {"HOME": str(folder), "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
    given |= {"WANDB_ERROR_REPORTING": "false", "WANDB_CONFIG_DIR": str(folder / "config")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=given, cwd=folder
    )


def test_nothing_is_sent_where_wandb_was_told_to_stay_offline(tmp_path: Path, server: StandInServer) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    done = _run_elsewhere(tmp_path, f"http://127.0.0.1:{server.server_port}")
    assert done.returncode == 0, done.stderr
    assert server.asked == []
    (run,) = find_runs(tmp_path / "results" / "runs")
    assert read_manifest(run)["warnings"] == []
    assert list((run / "wandb").glob("offline-run-*"))


def test_a_run_without_network_is_kept_for_wandb_sync(tmp_path: Path) -> None:
    with socket.socket() as taken:
        # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        done = _run_elsewhere(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 0, done.stderr
    (run,) = find_runs(tmp_path / "results" / "runs")
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    (warning,) = read_manifest(run)["warnings"]
    assert f"wandb sync {folder.relative_to(tmp_path)}" in warning
    assert done.stderr.count("wandb sync") == 1
