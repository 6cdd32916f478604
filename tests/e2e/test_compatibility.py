"""What runs inside: each row of docs/COMPATIBILITY.md is tried, under the policy that it names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

HERE: Final = Path(__file__).resolve().parents[2]
TABLE: Final = re.compile(r"^\| ([^|]+) \| (works|with help|no) \|", re.MULTILINE)
NPM: Final = HERE / ".node-agents" / "node_modules"
PYTHONS: Final = HERE / ".venv-litellm"

SERVER: Final = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("served"))])
"""
NODE: Final = """
const http = require("http"), cp = require("child_process"), {Worker} = require("worker_threads");
http.createServer((q, r) => r.end(cp.execFileSync("echo", ["served"]))).listen(8080, "127.0.0.1");
new Worker("require('worker_threads').parentPort.postMessage(1)", {eval: true});
"""
POOL: Final = "import multiprocessing as m; print(sum(m.Pool(4).map(abs, range(-9, 1))), m.Lock().acquire())"
FETCH: Final = "for i in $(seq 100); do curl -sf http://127.0.0.1:{port}/{path} && break; sleep 0.1; done"
LOCAL: Final = "{server} >/dev/null 2>&1 & " + FETCH

# Name in the table: what is run by a shell in /workspace, and what it prints last.
WORKS: Final = {
    "gcc": ("printf 'int puts(const char*);int main(){puts(\"built\");}' > a.c && gcc -w -O2 a.c && ./a.out", "built"),
    "git": (
        ("git init -q a && cd a && git config user.email a@example.com && git config user.name a && echo 1 > f && "
        "git add f && git commit -qm one && git clone -q . ../b && git worktree add -q ../w && git gc -q && "
        "git -C ../b log --format=%s"),
        "one",
    ),
    "tmux": (
        ("tmux -S s -f /dev/null new-session -d 'tty > seen; sleep 9'; for i in $(seq 50); do [ -s seen ] && break; "
        "sleep 0.1; done; tmux -S s kill-server; cut -c 1-8 seen"),
        "/dev/pts",
    ),
    "sqlite3": (
        "sqlite3 a.db 'pragma journal_mode=wal; create table t(a); insert into t values(7); select * from t'",
        "7",
    ),
    "npm-installed CLI": ("echo 'a  =  1' > a.js; /opt/npm/.bin/prettier a.js", "a = 1;"),
    "pip-installed asyncio server": (
        f"cat > app.py <<'END'\n{SERVER}\nEND\n"
        + LOCAL.format(server="/opt/py/bin/python -m uvicorn --port 8000 app:app", port=8000, path=""),
        "served",
    ),
    "Node server on localhost": (
        f"cat > s.js <<'END'\n{NODE}\nEND\n" + LOCAL.format(server="node s.js", port=8080, path=""),
        "served",
    ),
    "python -m http.server": (
        "echo served > page; "
        + LOCAL.format(server="python3 -m http.server 80 --bind 127.0.0.1", port=80, path="page"),
        "served",
    ),
    "Python multiprocessing": (f"cat > a.py <<'END'\n{POOL}\nEND\npython3 a.py", "45 True"),
}  # fmt: skip
# What does not: the command, and what it says.
REFUSED: Final = {
    "bubblewrap inside": ("bwrap --ro-bind / / --proc /proc true", r"No permissions to create|Operation not permitted"),
    "Docker, Podman": (
        "ls /var/run/docker.sock /run/podman /run/containerd; unshare --user --map-root-user true",
        r"unshare failed: Operation not permitted",
    ),
    "GPU": ("ls /dev/dri /dev/nvidia0 /dev/kfd /dev/nvidiactl", r"(?s)(No such file.*){4}"),
    "ptrace debuggers": ("strace true", r"Operation not permitted"),
    "ping, raw sockets": (
        "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)'",
        r"PermissionError",
    ),
    "programs that need IPv6": (
        "python3 -c 'import socket; socket.socket(socket.AF_INET6)'",
        r"Address family not supported",
    ),
}
# Rows with a test function of their own, here or where the row says.
OTHERS: Final = {
    "Claude Code", "Codex", "OpenAI Agents SDK", "venv on a Python outside /usr", "Chromium, Playwright",
}  # fmt: skip


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


def test_no_row_is_missing() -> None:
    rows = dict(TABLE.findall((HERE / "docs" / "COMPATIBILITY.md").read_text()))
    assert rows.keys() == WORKS.keys() | REFUSED.keys() | OTHERS
    assert {name for name, verdict in rows.items() if verdict == "no"} == REFUSED.keys()
    assert {rows[name] for name in WORKS} == {"works"}


@pytest.mark.parametrize("name", WORKS)
def test_it_works(stockade: Instance, name: str) -> None:
    command, expected = WORKS[name]
    workspace = stockade.workspace()
    shown = ("--scope", f"fs:ro:{NPM}=/opt/npm", "--scope", f"fs:ro:{PYTHONS}=/opt/py")
    done = stockade.run(command, "--workspace", f"{workspace}:rw", *shown)
    assert done.out.splitlines()[-1:] == [expected], (done.out, done.err)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(stockade: Instance, name: str) -> None:
    command, expected = REFUSED[name]
    assert shutil.which(command.split()[0]), f"{command.split()[0]} is not installed"
    done = stockade.run(command)
    assert done.code != 0
    assert re.search(expected, done.out + done.err), (done.out, done.err)


def test_a_venv_on_a_python_outside_usr_needs_its_base(stockade: Instance) -> None:
    base, venv = stockade.directory / "base", stockade.directory / "venv"
    (base / "bin").mkdir(parents=True)
    shutil.copy2("/usr/bin/python3", base / "bin" / "python3")
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv], check=True)
    (venv / "bin" / "python3").unlink()
    (venv / "bin" / "python3").symlink_to("/opt/base/bin/python3")
    shown = ("--scope", f"fs:ro:{venv}=/opt/venv")
    assert stockade.ctl("run", *shown, "--", "/opt/venv/bin/python3", "-c", "print(1)").code == 127
    done = stockade.ctl(
        "run", *shown, "--scope", f"fs:ro:{base}=/opt/base", "--", "/opt/venv/bin/python3", "-c", "print(1)"
    )
    assert (done.code, done.out) == (0, "1\n")


@pytest.mark.long
def test_chromium_needs_its_sandbox_off(stockade: Instance) -> None:
    assert shutil.which("chromium"), "run ./bootstrap test-full"
    page = "data:text/html,<p>made by <script>document.write(6*7)</script></p>"
    flags = (
        "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --user-data-dir=/tmp/profile"
    )
    done = stockade.run(f"chromium {flags} --no-sandbox --dump-dom '{page}'", "--policy", "coding-agent", seconds=100)
    assert "made by <script>document.write(6*7)</script>42" in done.out, done.err
    with_sandbox = stockade.run(f"chromium {flags} --dump-dom '{page}'", "--policy", "coding-agent", seconds=100)
    assert with_sandbox.code != 0
