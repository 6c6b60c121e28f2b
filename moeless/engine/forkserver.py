"""A process without threads of its own, from which ranks are forked.

Libraries that a command has loaded keep threads (numerical ones, W&B, compiled loops), and a process that is forked
while they hold a lock waits for it for ever. So a fresh process imports what ranks need, with one thread, and forks
them. It can do so several times; what was imported once is there.

The command and this process speak in lines of JSON: a request names a function that prepares the work, and the answer
says how it ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from moeless.engine.launch import die_with, run_forked
from moeless.errors import RunFailed, UserError

#: Imports are faster without the compiler, and no library starts threads.
_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from moeless.engine.forkserver import main; main()"
#: Seconds that the process has to end its ranks.
_END_SECONDS = 10.0


class ForkServer:
    """A process that forks ranks; it ends with this one."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        # an interrupt is this process's to handle; the other one ignores it as soon as it runs
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(os.getpid()), str(writing)],
                stdin=subprocess.PIPE,
                # standard output is the command's own
                stdout=2,
                pass_fds=(writing,),
                env=os.environ | _ENVIRONMENT,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, prepare: str, argument: Any, ranks: int) -> None:
        """Fork ranks and wait for them.

        Args:
            prepare: ``module:function``; called with ``argument`` in the other process before the fork, it returns the
                work, a function of the rank that each child calls.
            argument: anything that JSON holds.

        Raises:
            UserError: the preparation or a rank refused the request.
            RunFailed: a rank failed or was killed; the others are ended first. The sentence names the rank.
        """
        assert self._process.stdin is not None
        request = json.dumps({"prepare": prepare, "argument": argument, "ranks": ranks}) + "\n"
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(request.encode())
                self._process.stdin.flush()
            line = self._answers.readline()
        except BaseException:
            self.close()
            raise
        if not line:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            raise RunFailed(f"the process that starts the ranks {how}; the run was stopped")
        answer = json.loads(line)
        if answer["kind"] == "user":
            raise UserError(answer["message"])
        if answer["kind"] == "run":
            raise RunFailed(answer["message"])

    def close(self) -> None:
        """End the process, and before it the ranks that still run."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


def main() -> None:
    """The program: answer requests until there are no more."""
    parent, answers = int(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w", encoding="utf-8")
    os.set_inheritable(answers.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _end)
    die_with(parent)
    # the ranks' own standard input is empty
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    try:
        for line in requests:
            answers.write(json.dumps(_answer(**json.loads(line))) + "\n")
            answers.flush()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def _end(*_: object) -> None:
    raise SystemExit(0)


def _answer(prepare: str, argument: Any, ranks: int) -> dict[str, str]:
    try:
        run_forked(_work(prepare, argument), ranks)
        return {"kind": "done"}
    except UserError as error:
        return {"kind": "user", "message": str(error)}
    except RunFailed as error:
        return {"kind": "run", "message": str(error)}
    except Exception as error:
        if os.environ.get("MOELESS_TRACEBACK"):
            import traceback

            traceback.print_exc()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"kind": "run", "message": f"the ranks cannot be started: {type(error).__name__}: {first}"}


def _work(prepare: str, argument: Any) -> Callable[[int], None]:
    import torch

    torch.set_num_threads(1)
    module, _, name = prepare.partition(":")
    work: Callable[[int], None] = getattr(importlib.import_module(module), name)(argument)
    return work
