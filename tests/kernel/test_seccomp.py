"""The shipped profile in real processes: what the kernel answers, and that real programs work under it.

Every attempt is harmless where the filter fails (faulting pointers, bad flags, descriptor -1), and each is made a
second time without the filter, where the kernel must answer something else: an attempt that cannot tell proves nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sandbox import seccomp

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "policies" / "seccomp" / "default.json"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: without it the kernel refuses much of this by itself"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64"),
]

LOAD = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from sandbox import syscalls
def load(path):
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    for name in sorted(os.listdir(path)):
        syscalls.seccomp_filter(open(os.path.join(path, name), "rb").read())
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    arguments = [ctypes.c_ulong(value % 2**64) for value in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return ctypes.get_errno() if result == -1 else 0
"""
ATTEMPTS = """
import json
if sys.argv[2]:
    load(sys.argv[2])
print(json.dumps([call(*attempt) for attempt in json.load(sys.stdin)]))
"""
EXEC = """
load(sys.argv[2])
os.execvp(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("filters")
    directory.chmod(0o755)
    directory.parent.chmod(0o755)
    for index, program in enumerate(seccomp.compile(seccomp.load(PROFILE)).programs):
        (directory / f"{index}.bpf").write_bytes(program)
    return str(directory)


def answers(programs: str, attempts: list[tuple[int, ...]]) -> list[str]:
    """What the kernel says to each attempt, as errno names; `programs` empty: without the filter."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOAD + ATTEMPTS, str(ROOT), programs],
        input=json.dumps(attempts),
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return [errno.errorcode.get(code, "done") for code in json.loads(done.stdout)]


NEW_BITS = {
    "NEWNS": 0x20000,
    "NEWCGROUP": 0x2000000,
    "NEWUTS": 0x4000000,
    "NEWIPC": 0x8000000,
    "NEWUSER": 0x10000000,
    "NEWPID": 0x20000000,
    "NEWNET": 0x40000000,
}
BAD_CLONE = 0x800  # CLONE_SIGHAND without CLONE_VM: EINVAL by itself
REFUSED: dict[str, tuple[int, ...]] = {
    "ptrace": (101, 0x4206, 0),
    "process_vm_readv": (310, 0, 1, 1, 1, 1, 0),
    "process_vm_writev": (311, 0, 1, 1, 1, 1, 0),
    "kcmp": (312, 0, 0, 0, 0, 0),
    "pidfd_getfd": (438, -1, -1, 0),
    "bpf": (321, 999, 1, 1),
    "perf_event_open": (298, 1, 0, -1, -1, 0),
    "userfaultfd": (323, 0xFFFFFF),
    "io_uring_setup": (425, 1, 0),
    "io_uring_enter": (426, -1, 0, 0, 0, 0, 0),
    "io_uring_register": (427, -1, 0, 0, 0),
    "add_key": (248, 1, 1, 1, 1, 0),
    "request_key": (249, 1, 1, 1, 0),
    "keyctl": (250, 999, 0, 0, 0, 0),
    "mount": (165, 1, 1, 1, 0, 0),
    "umount2": (166, 1, 0),
    "pivot_root": (155, 1, 1),
    "chroot": (161, 1),
    "open_tree": (428, -1, 1, 0),
    "move_mount": (429, -1, 1, -1, 1, 0),
    "fsopen": (430, 1, 0),
    "fsconfig": (431, -1, 0, 0, 0, 0),
    "fsmount": (432, -1, 0, 0),
    "fspick": (433, -1, 1, 0),
    "mount_setattr": (442, -1, 1, 0, 0, 0),
    "open_by_handle_at": (304, -1, 1, 0),
    "name_to_handle_at": (303, -1, 1, 1, 1, 0),
    "setns": (308, -1, 0),
    "init_module": (175, 1, 0, 1),
    "finit_module": (313, -1, 1, 0),
    "delete_module": (176, 1, 0),
    "kexec_load": (246, 0, 0, 0, 0xFFFF),
    "reboot": (169, 0, 0, 0, 0),
    "swapon": (167, 1, 0),
    "swapoff": (168, 1),
    "acct": (163, 1),
    "sethostname": (170, 1, 5),
    "setdomainname": (171, 1, 5),
    "clock_settime": (227, 0, 1),
    "settimeofday": (164, 1, 0),
    "adjtimex": (159, 1),
    "syslog": (103, 10, 0, 0),
    "quotactl": (179, 0, 1, 0, 0),
    "fanotify_init": (300, 0xFFFFFFFF, 0),
    "fanotify_mark": (301, -1, 0, 0, -1, 1),
    "personality": (135, 0xFFFFFFFF),
    "modify_ldt": (154, 0, 1, 0),
    "iopl": (172, 0),
    "ioperm": (173, 0, 0, 0),
    "move_pages": (279, 0, 1, 1, 1, 1, 0),
    "migrate_pages": (256, 0, 1, 1, 1),
    "memfd_secret": (447, 0xFFFFFF),
    "process_madvise": (440, -1, 1, 0, 0, 0),
    "a seccomp listener": (317, 1, 8, 0),
    "TIOCSTI": (16, -1, 0x5412, 0),
    "TIOCSTI with high bits": (16, -1, 0x5412 | 1 << 40, 0),
    "TIOCLINUX": (16, -1, 0x541C, 0),
    "unshare a time namespace": (272, 0x80 | 1),
    **{f"clone {name}": (56, bit | BAD_CLONE, 0, 0, 0, 0) for name, bit in NEW_BITS.items()},
    **{f"unshare {name}": (272, bit | 1) for name, bit in NEW_BITS.items()},
    "raw socket": (41, 2, 3, 255),
    "packet socket": (41, 17, 3, 0),
    "ICMP socket": (41, 2, 2, 1),
    "vsock": (41, 40, 1, 0),
    "alg socket": (41, 38, 5, 0),
    "xdp socket": (41, 44, 3, 0),
    "netlink audit": (41, 16, 3, 9),
    "netlink netfilter": (41, 16, 3, 12),
}


def test_what_the_profile_refuses_is_refused_before_it_reaches_the_kernel(programs: str) -> None:
    attempts = list(REFUSED.values())
    with_filter = dict(zip(REFUSED, answers(programs, attempts), strict=True))
    assert {name: answer for name, answer in with_filter.items() if answer != "EPERM"} == {}


def test_the_same_attempts_get_another_answer_without_the_filter(programs: str) -> None:
    assert programs
    without = dict(zip(REFUSED, answers("", list(REFUSED.values())), strict=True))
    assert [name for name, answer in without.items() if answer == "EPERM"] == []


MISSING: dict[str, tuple[int, ...]] = {
    "clone3": (435, 0, 0),
    "openat2": (437, -1, 0, 0, 0),
    "fchmodat2": (452, -1, 1, 0, 0),
    "statmount": (457, 1, 1, 0, 0xFF),
    "listmount": (458, 1, 1, 0, 0xFF),
    "mseal": (462, 1, 1, 1),
    "open_tree_attr": (467, -1, 1, 0, 1, 1),
    "a call of the future": (999,),
}
WITH_ANSWER: dict[str, tuple[tuple[int, ...], str]] = {
    "IPv6 socket": ((41, 10, 1, 0), "EAFNOSUPPORT"),
    "IPv6 datagrams": ((41, 10, 2, 0), "EAFNOSUPPORT"),
    "MPTCP": ((41, 2, 1, 262), "EPROTONOSUPPORT"),
    **{name: (attempt, "ENOSYS") for name, attempt in MISSING.items()},
}


def test_calls_that_libraries_probe_get_the_answer_that_makes_them_fall_back(programs: str) -> None:
    got = dict(zip(WITH_ANSWER, answers(programs, [item for item, _ in WITH_ANSWER.values()]), strict=True))
    assert got == {name: answer for name, (_, answer) in WITH_ANSWER.items()}


ALLOWED: dict[str, tuple[tuple[int, ...], str]] = {
    "getpid": ((39,), "done"),
    "unix stream": ((41, 1, 1, 0), "done"),
    "unix seqpacket": ((41, 1, 5, 0), "done"),
    "tcp": ((41, 2, 1 | 0o2004000, 0), "done"),
    "tcp by number": ((41, 2, 1, 6), "done"),
    "udp": ((41, 2, 2, 17), "done"),
    "netlink route": ((41, 16, 3, 0), "done"),
    "unshare the descriptor table": ((272, 0x400), "done"),
    "a filter of one's own": ((317, 1, 0, 0), "EFAULT"),
    "window size": ((16, -1, 0x5413, 0), "EBADF"),
    "landlock version": ((444, 0, 0, 1), "done"),
    "pidfd_open": ((434, -1, 0), "EINVAL"),
    "futex_waitv": ((449, 0, 0, 0, 0, 0), "EINVAL"),
    "close_range": ((436, 1000, 1000, 0), "done"),
    "clone without new namespaces": ((56, BAD_CLONE, 0, 0, 0, 0), "EINVAL"),
}


def test_what_programs_need_reaches_the_kernel(programs: str) -> None:
    got = dict(zip(ALLOWED, answers(programs, [item for item, _ in ALLOWED.values()]), strict=True))
    expected = {name: answer for name, (_, answer) in ALLOWED.items()}
    if got["landlock version"] == "ENOSYS" and answers("", [(444, 0, 0, 1)]) == ["ENOSYS"]:
        expected["landlock version"] = "ENOSYS"  # a kernel without Landlock (User-Mode Linux)
    assert got == expected


UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
ENVIRONMENT = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "SHELL": "/bin/sh"}


def confined(programs: str, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command under the filter as an unprivileged user."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOAD + EXEC, str(ROOT), programs, *UNPRIVILEGED, *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=cwd,
        env={**ENVIRONMENT, "HOME": str(cwd or "/nonexistent"), "TMPDIR": str(cwd or "/tmp")},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    made = tmp_path / "home"
    made.mkdir()
    os.chown(made, 65534, 65534)
    return made


def test_set_id_bits_reach_no_file(programs: str, home: Path) -> None:
    done = confined(
        programs, "sh", "-c", "touch f && chmod 755 f && chmod 4755 f; chmod g+s f; mkdir -m 2755 d", cwd=home
    )
    assert done.stderr.count("Operation not permitted") == 3
    assert (home / "f").stat().st_mode & 0o7777 == 0o755
    subprocess.run([*UNPRIVILEGED, "chmod", "4755", "f"], cwd=home, check=True)  # the twin, without the filter
    assert (home / "f").stat().st_mode & 0o7777 == 0o4755


INT_80 = """
    import ctypes, mmap, sys
    # mov eax, 20 (getpid of i386); int 0x80; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000cd80c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""


def test_the_32_bit_entry_is_closed(programs: str) -> None:
    program = textwrap.dedent(INT_80)
    assert confined(programs, sys.executable, "-I", "-S", "-c", program).stdout.strip() == str(-errno.ENOSYS)
    plain = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    if plain.returncode == 0 and plain.stdout.strip() != str(-errno.ENOSYS):
        assert int(plain.stdout) > 0  # the twin, where this kernel has the 32-bit entry at all


def test_every_thread_is_under_the_filter(programs: str) -> None:
    program = """
        import ctypes, threading
        libc = ctypes.CDLL(None, use_errno=True)
        def attempt():
            print(libc.unshare(0x10000000), ctypes.get_errno())
        thread = threading.Thread(target=attempt); thread.start(); thread.join()
    """
    done = confined(programs, sys.executable, "-I", "-S", "-c", textwrap.dedent(program))
    assert done.stdout.split() == ["-1", str(errno.EPERM)]


C = '#include <stdio.h>\\n#include <threads.h>\\nint main(void){puts("compiled");return 0;}'
ASYNCIO = """
import asyncio, concurrent.futures, multiprocessing, os, pathlib, shutil, sqlite3, ssl, subprocess, tempfile
async def main():
    async def serve(reader, writer):
        writer.write(await reader.readline()); await writer.drain(); writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"echo\\n")
    assert await reader.readline() == b"echo\\n"
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert (await process.communicate(b"sub"))[0] == b"sub"
    unix = await asyncio.start_unix_server(serve, "s.sock")
    unix.close()
asyncio.run(main())
with concurrent.futures.ProcessPoolExecutor(2) as pool:
    assert list(pool.map(abs, [-1, -2])) == [1, 2]
with tempfile.TemporaryDirectory() as name:
    pathlib.Path(name, "a").write_text("x")
    shutil.copytree(name, name + "2"); shutil.rmtree(name + "2")
db = sqlite3.connect("x.db"); db.execute("create table t(a)"); db.commit()
ssl.create_default_context()
master, slave = os.openpty()
print("fine")
"""
NODE = """
const http = require("http"), fs = require("fs"), cp = require("child_process"), {Worker} = require("worker_threads");
const server = http.createServer((q, r) => r.end("fine")).listen(0, "127.0.0.1", () => {
  http.get({port: server.address().port, host: "127.0.0.1"}, r => r.on("data", d => {
    fs.writeFileSync("out", d); cp.execFileSync("true");
    new Worker("1", {eval: true}).on("exit", () => { console.log(fs.readFileSync("out", "utf8")); process.exit(0); });
  }));
});
"""
PROGRAMS = {
    "gcc": (f"printf '{C}' > a.c && gcc -o a a.c && ./a", "compiled"),
    "python3": (f"cat > a.py <<'END'\n{ASYNCIO}\nEND\npython3 a.py", "fine"),
    "node": (f"cat > a.js <<'END'\n{NODE}\nEND\nnode a.js", "fine"),
    "git": (
        # every way of making files and directories that git knows
        (
            "git init -q r && cd r && git config user.email a@b && git config user.name a && echo x > f && git add f "
            "&& git commit -qm m && git clone -q . ../c && git -C ../c log --format=%s && git gc -q "
            "&& git worktree add -q ../w"
        ),
        "m",
    ),
    "tmux": (
        (
            "tmux -S $PWD/s -f /dev/null new-session -d 'echo seen > out; sleep 5' && "
            "for i in 1 2 3 4 5 6 7 8 9; do [ -s out ] && break; sleep 0.3; done; tmux -S $PWD/s kill-server; cat out"
        ),
        "seen",
    ),
    "ip": ("ip route >/dev/null && ip -o link show lo | cut -d: -f2", "lo"),
    "tar": ("mkdir d && echo x > d/f && tar czf d.tgz d && rm -r d && tar xzf d.tgz && cat d/f", "x"),
    "curl": ("curl -sS --max-time 2 http://127.0.0.1:1/ 2>&1 | grep -c 'onnect'", "1"),
    "strace cannot": ("strace true 2>&1 | grep -q 'not permitted' && echo refused", "refused"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_real_programs_work(programs: str, home: Path, name: str) -> None:
    command, expected = PROGRAMS[name]
    tool = name.split(maxsplit=1)[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = confined(programs, "sh", "-c", command, cwd=home)
    lines = done.stdout.split()
    assert lines[-1:] == [expected] or lines[:1] == [expected], (done.stdout, done.stderr)
