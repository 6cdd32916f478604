"""What Stockade is measured beside: bubblewrap, crun and squid from Debian, each as its manual says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BWRAP = [
    "bwrap", "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64",
    "/lib64", "--symlink", "usr/bin", "/bin", "--proc", "/proc", "--dev", "/dev",
]  # fmt: skip
READY_SECONDS = 20


def bwrap_true() -> None:
    """Run `true` in bubblewrap: no network, no cgroup, no filter."""
    subprocess.run([*BWRAP, "true"], check=True)


def bwrap_veth_true(name: str) -> None:
    """Do the same in a network namespace with a veth and one route, a command of ip(8) each."""
    outside, inside = f"{name}o", f"{name}i"
    ip("netns", "add", name)
    try:
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        ip("addr", "add", "198.18.1.1/32", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", name, "link", "set", inside, "up")
        ip("-n", name, "addr", "add", "198.18.1.2/32", "dev", inside)
        ip("-n", name, "route", "add", "198.18.1.1", "dev", inside)
        ip("netns", "exec", name, *BWRAP, "--share-net", "true")
    finally:
        ip("netns", "del", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def bwrap_veth_batch_true(name: str) -> None:
    """Do the same as quickly as ip(8) can: its commands in two batches."""
    outside, inside = f"{name}o", f"{name}i"
    batch = (
        f"link add {outside} type veth peer name {inside} netns {name}\n"
        f"addr add 198.18.1.1/32 dev {outside}\nlink set {outside} up\n"
    )
    within = f"link set {inside} up\naddr add 198.18.1.2/32 dev {inside}\nroute add 198.18.1.1 dev {inside}\n"
    ip("netns", "add", name)
    try:
        subprocess.run(["ip", "-batch", "-"], input=batch.encode(), check=True)
        subprocess.run(["ip", "-n", name, "-batch", "-"], input=within.encode(), check=True)
        ip("netns", "exec", name, *BWRAP, "--share-net", "true")
    finally:
        ip("netns", "del", name)


class Crun:
    """Runs containers of one bundle: the host's /usr read-only, namespaces as `crun spec` gives them, a cgroup.

    On a hybrid host (controllers on v1) Debian's crun gives up. There it gets a mount namespace of its own that does
    not show the v2 tree, entered by nsenter(1), which is part of its time there.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.bundle = directory / "bundle"
        self.name = name
        self._command = ["crun", "--root", str(directory / "crun")]
        self._view = _without_unified() if Path("/sys/fs/cgroup/unified").exists() else None
        rootfs = self.bundle / "rootfs"
        for path in ("usr", "proc", "dev", "sys", "tmp"):
            (rootfs / path).mkdir(parents=True, exist_ok=True)
        for link in ("bin", "lib", "lib64"):
            (rootfs / link).symlink_to(f"usr/{link}")
        subprocess.run(["crun", "spec"], cwd=self.bundle, check=True)

    def configure(self, *argv: str) -> None:
        """Write the bundle's config.json for this command."""
        path = self.bundle / "config.json"
        spec = json.loads(path.read_text())
        spec["process"] |= {"terminal": False, "args": list(argv), "noNewPrivileges": True}
        spec["mounts"] = [m for m in spec["mounts"] if m["destination"] not in {"/sys/fs/cgroup", "/usr"}]
        spec["mounts"].append({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]})
        spec["linux"]["resources"] = {"pids": {"limit": 2048}, "memory": {"limit": 1 << 30}}
        spec["linux"]["cgroupsPath"] = f"/{self.name}"
        path.write_text(json.dumps(spec))

    def true(self) -> None:
        """Run the configured command to its end."""
        self._run("run", "--bundle", str(self.bundle), self.name)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the configured command running, and delete the container by force at the end."""
        self._run("run", "--detach", "--bundle", str(self.bundle), self.name)
        try:
            yield
        finally:
            self._run("delete", "--force", self.name, check=False)

    def delete(self) -> None:
        self._run("delete", "--force", self.name)

    def close(self) -> None:
        if self._view is not None:
            self._view.kill()
            self._view.wait()

    def _run(self, *arguments: str, check: bool = True) -> None:
        enter = [] if self._view is None else ["nsenter", f"--mount=/proc/{self._view.pid}/ns/mnt"]
        subprocess.run(
            [*enter, *self._command, *arguments],
            check=check,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _without_unified() -> subprocess.Popen[bytes]:
    """Keep a mount namespace in which the empty v2 tree of a hybrid host is not seen."""
    script = "umount /sys/fs/cgroup/unified && echo ok && exec sleep 3600"
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ok\n":
        raise RuntimeError("cannot make a mount namespace")
    return process


class Echo:
    """An echo server on loopback; with `speaks_connect`, behind a CONNECT that it answers itself."""

    def __init__(self, *, speaks_connect: bool) -> None:
        self._speaks = speaks_connect
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.port = 0

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        ready.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if self._speaks:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextlib.contextmanager
def squid(directory: Path, allowed_port: int) -> Iterator[int]:
    """Run squid as a CONNECT proxy on loopback, without cache and log; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work = directory / "squid"
    work.mkdir()
    shutil.chown(work, "proxy", "proxy")
    config = work / "squid.conf"
    config.write_text(
        f"http_port 127.0.0.1:{port}\nacl echo port {allowed_port}\nhttp_access allow CONNECT echo\n"
        "http_access deny all\ncache deny all\naccess_log none\ncache_log /dev/null\nshutdown_lifetime 0 seconds\n"
        f"pid_filename {work}/squid.pid\ncoredump_dir {work}\nworkers 1\nvisible_hostname bench.invalid\n"
        "max_filedescriptors 4096\n"
    )
    process = subprocess.Popen(["squid", "-N", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError("squid does not start") from None
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pss_kib(pid: int) -> int:
    """Give the proportional set size of a process (proc_pid_smaps(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise RuntimeError("no Pss line")


def bare_cgroup_kill(group: Path) -> float:
    """Kill a group by cgroup.kill alone; gives milliseconds until it is empty."""
    began = time.perf_counter()
    (group / "cgroup.kill").write_text("1")
    while "populated 1" in (group / "cgroup.events").read_text():
        time.sleep(0.0005)
    return (time.perf_counter() - began) * 1000
