"""Run the README's commands on bare systems that have nothing: a Debian root, an ordinary user, Python, make and git.

Needs root, debootstrap (installed where it is missing) and the package registries. Every system is a folder that is
made once and kept; users, clones and environments in it are new in every run. Mounts and processes live in namespaces
of their own and are gone when this program ends, however it ends.

    python3 .ci/fresh.py                                every system, every step, a table at the end
    python3 .ci/fresh.py --system trixie --step demo    one of them
    python3 .ci/fresh.py --document docs/machines.md    the table into the document, between its two marks

Exit status 0: every row is green; 1: one is not; 3: the systems cannot be made here (said in one line), nothing ran.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"trixie": "Debian 13", "forky": "Debian testing"}
PACKAGES = "python3,python3-venv,make,git,ca-certificates"
USER, HOME = "tester", "/home/tester"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
BEGIN, END = "<!-- made by `make fresh` -->", "<!-- end -->"
NOT_HERE = 3
#: Distributions whose versions the table shows.
SHOWN = ("torch", "megatron-core", "transformers", "numpy")

LIVE = (
    "moeless serve-bench --backend live --ranks 2 --max-requests 6 --policy static --policy elastic --verify --no-wandb"
)
WHEEL = "export PATH=$HOME/wheel/bin:$PATH PYTHONSAFEPATH=1; cd ~/work;"


@dataclass(frozen=True)
class Step:
    """One row of the table: commands that an ordinary user types, with the environment whose versions count."""

    name: str
    title: str
    script: str
    environment: str


STEPS = (
    Step("demo", "`make demo`, pinned versions", "cd ~/project && make demo", "project/.venv"),
    Step("test", "`make test`, pinned versions", "cd ~/project && make test", "project/.venv"),
    Step(
        "wheel",
        "wheel without constraints, `moeless demo`",
        "rm -rf ~/project/.venv; mkdir -p ~/work; python3 -m venv ~/wheel && ~/wheel/bin/pip install build && "
        "~/wheel/bin/python -m build --wheel --outdir ~/dist ~/project && "
        f"~/wheel/bin/pip install ~/dist/*.whl && {WHEEL} moeless demo",
        "wheel",
    ),
    Step("live-megatron", "wheel, live engine, Megatron host", f"{WHEEL} {LIVE} --host megatron", "wheel"),
    Step("live-transformers", "wheel, live engine, Transformers host", f"{WHEEL} {LIVE} --host transformers", "wheel"),
    Step(
        "engine-tests",
        "wheel, the engine's tests",
        'wheel=$(echo ~/dist/*.whl); ~/wheel/bin/pip install "$wheel[dev]" && export PYTHONSAFEPATH=1 && '
        "cd ~/project && ~/wheel/bin/pytest tests/engine",
        "wheel",
    ),
)


@dataclass
class Row:
    """How a step ended on a system."""

    system: str
    python: str
    step: str
    versions: str
    outcome: str
    seconds: float
    good: bool


def main() -> int:
    """Parse the command line; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp/moeless-fresh"), help="where the systems are kept"
    )
    parser.add_argument("--system", action="append", choices=SYSTEMS, help="default: all; repeatable")
    parser.add_argument(
        "--step", action="append", choices=[step.name for step in STEPS], help="default: all; repeatable"
    )
    parser.add_argument("--document", type=Path, help="write the table into this file, between its marks")
    parser.add_argument("--keep", action="store_true", help="leave the environments (6 GB each) when done")
    arguments = parser.parse_args()
    missing = why_not_here()
    if missing:
        print(f"fresh systems are left out: {missing}", flush=True)
        return NOT_HERE
    if os.environ.get("MOELESS_FRESH_INSIDE") != "1":
        # mounts and processes of their own, which end with the first process; this one becomes it
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, "MOELESS_FRESH_INSIDE": "1"})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lock = (arguments.folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"fresh systems are left out: another run uses {arguments.folder}", flush=True)
        return NOT_HERE
    wanted = [step for step in STEPS if not arguments.step or step.name in arguments.step]
    rows: list[Row] = []
    # one revision for all rows, whatever is committed meanwhile
    revision = git("rev-parse", "--short", "HEAD").stdout.strip()
    for suite in arguments.system or SYSTEMS:
        system = System(arguments.folder / suite, suite)
        try:
            system.prepare(revision)
        except subprocess.CalledProcessError as error:
            print(f"fresh systems are left out: {SYSTEMS[suite]} cannot be made here ({last_line(error)})", flush=True)
            return NOT_HERE
        try:
            rows += system.run(wanted)
        finally:
            if not arguments.keep:
                system.clear()
    print(table(rows))
    if arguments.document:
        write_document(arguments.document, rows, revision)
    return 0 if all(row.good for row in rows) else 1


def why_not_here() -> str:
    """What keeps systems from being made on this machine; empty where nothing does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "they are made by root on Linux"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        return "this container may not mount"
    if shutil.which("debootstrap") is None:
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "debootstrap"]):
            if shutil.which("apt-get") is None or subprocess.run(command, capture_output=True).returncode != 0:
                return "debootstrap is not installed"
    return ""


class System:
    """A bare system in a folder."""

    def __init__(self, path: Path, suite: str) -> None:
        self.path, self.suite = path, suite
        self.log = path.with_name(f"{suite}.log")

    def prepare(self, revision: str) -> None:
        """Make the system where it is missing, mount what programs need, add the user and a clone at a revision.

        Raises:
            CalledProcessError: the system or the clone cannot be made.
        """
        ready = self.path.with_name(f"{self.suite}.ready")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not ready.exists():
            print(f"making {SYSTEMS[self.suite]} in {self.path}, once", flush=True)
            shutil.rmtree(self.path, ignore_errors=True)
            scripts = Path("/usr/share/debootstrap/scripts")
            # an older debootstrap does not know the names of later suites
            if not (scripts / self.suite).exists():
                (scripts / self.suite).symlink_to("sid")
            made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", self.suite, str(self.path), *mirror()]
            subprocess.run(made, check=True, capture_output=True, text=True)
            ready.touch()
        for name in (CERTIFICATES, "/etc/resolv.conf", "/etc/hosts"):
            if Path(name).exists():
                shutil.copy(name, self.path / name[1:])
        for kind, source, place in (("proc", "proc", "proc"), ("", "/dev", "dev"), ("tmpfs", "shm", "dev/shm")):
            how = ["-t", kind] if kind else ["--rbind"]
            subprocess.run(["mount", *how, source, str(self.path / place)], check=True, capture_output=True, text=True)
        self.clear()
        if subprocess.run(["chroot", self.path, "id", USER], capture_output=True).returncode != 0:
            self._as_root("useradd", "--create-home", "--shell", "/bin/bash", USER)
        home = self.path / HOME[1:]
        home.mkdir(parents=True, exist_ok=True)
        git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(home / "project"))
        git("-C", str(home / "project"), "checkout", "--quiet", "-B", "main", revision)
        self._as_root("chown", "-R", f"{USER}:{USER}", HOME)

    def clear(self) -> None:
        """Remove what the user left, so that the next run begins with nothing."""
        shutil.rmtree(self.path / HOME[1:], ignore_errors=True)
        shutil.rmtree(self.path / "tmp", ignore_errors=True)
        (self.path / "tmp").mkdir(exist_ok=True)
        (self.path / "tmp").chmod(0o1777)

    def run(self, steps: list[Step]) -> list[Row]:
        """Run steps in order, whatever the others' outcome."""
        rows = []
        python = self.shell("python3 --version").stdout.split()[-1]
        self.log.write_text("")
        for step in steps:
            print(f"\n== {SYSTEMS[self.suite]}, Python {python}: {step.title}", flush=True)
            began = time.monotonic()
            status, text = self.watched(step.script)
            seconds = time.monotonic() - began
            outcome = "passed" if status == 0 else f"failed, status {status}"
            counts = re.findall(r"(\d+ (?:passed|failed|skipped|error)[^=\n]*) in ", text)
            outcome += f" ({counts[-1]})" if counts else ""
            rows.append(
                Row(SYSTEMS[self.suite], python, step.title, self.versions(step), outcome, seconds, status == 0)
            )
            if status != 0:
                print("\n".join(text.splitlines()[-40:]), flush=True)
            print(f"== {outcome}, {seconds:.0f} s", flush=True)
        return rows

    def versions(self, step: Step) -> str:
        """Versions of the main packages in a step's environment."""
        code = (
            "import importlib.metadata as m, json\n"
            f"names = {SHOWN!r}\n"
            "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in names}))"
        )
        done = self.shell(f"~/{step.environment}/bin/python -c {shlex.quote(code)}")
        found = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
        return ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)

    def shell(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script as the user and keep its output."""
        return subprocess.run(self._command(script), capture_output=True, text=True, errors="replace")

    def watched(self, script: str) -> tuple[int, str]:
        """Run a script as the user; status and output, which also goes to the log as it comes."""
        lines = []
        with self.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self._command(script), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                log.write(line)
                log.flush()
        return process.wait(), "".join(lines)

    def _command(self, script: str) -> list[str]:
        variables = {
            "HOME": HOME,
            "USER": USER,
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_CERT": CERTIFICATES,
            "SSL_CERT_FILE": CERTIFICATES,
            "REQUESTS_CA_BUNDLE": CERTIFICATES,
        }
        environment = [f"{name}={value}" for name, value in variables.items()]
        start = ["chroot", f"--userspec={USER}:{USER}", str(self.path), "/usr/bin/env", "-i", *environment]
        return [*start, "/bin/bash", "-o", "pipefail", "-c", script]

    def _as_root(self, *command: str) -> None:
        done = ["chroot", str(self.path), "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *command]
        subprocess.run(done, check=True, capture_output=True, text=True)


def mirror() -> list[str]:
    """The Debian mirror that this machine uses, where it names one."""
    for path in sorted(Path("/etc/apt/sources.list.d").glob("debian*.sources")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("URIs:"):
                return [line.split()[1]]
    return []


def last_line(error: subprocess.CalledProcessError) -> str:
    """The last line that a failed command printed."""
    text = f"{error.stdout or ''}\n{error.stderr or ''}".strip()
    return text.splitlines()[-1][:200] if text else f"exit status {error.returncode}"


def table(rows: list[Row]) -> str:
    """The outcome as a Markdown table."""
    lines = ["| system | Python | what | versions | outcome | seconds |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.system} | {r.python} | {r.step} | {r.versions} | {r.outcome} | {r.seconds:.0f} |" for r in rows]
    return "\n".join(lines)


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of git in this checkout, whoever owns it."""
    command = ["git", "-c", "safe.directory=*", *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


def write_document(path: Path, rows: list[Row], revision: str) -> None:
    """Put the table between the marks of a document."""
    text = path.read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0))
    note = f"Revision {revision}, {datetime.now(UTC):%d %B %Y}, {cores} cores, no GPU; `make fresh`."
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{note}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
