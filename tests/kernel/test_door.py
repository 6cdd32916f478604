"""The front door with a real gRPC server behind it and real processes of several users before it."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from stockade.v1 import actions_pb2, actions_pb2_grpc, agents_pb2, agents_pb2_grpc, system_pb2, system_pb2_grpc

from supervisord.callers import Access, CallerInterceptor, Role, current_caller
from supervisord.door import FrontDoor, listening_socket
from supervisord.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs clients as other users")

OPERATORS_GID, READERS_GID = 64001, 64002
ANYONE_UID = 64123
NOBODY = pwd.getpwnam("nobody").pw_uid
MEBIBYTE = 1 << 20
CLIENT_SECONDS_MAX = 20

# Run as another user: calls what its arguments say and prints what came of it as JSON.
CLIENT = textwrap.dedent("""
    import json, sys
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from stockade.v1 import actions_pb2, actions_pb2_grpc, agents_pb2, agents_pb2_grpc, system_pb2, system_pb2_grpc

    channel = grpc.insecure_channel("unix:" + sys.argv[1])
    calls = {
        "version": lambda: system_pb2_grpc.SystemServiceStub(channel).Version(
            system_pb2.VersionRequest(), timeout=10).version,
        "kill": lambda: len(agents_pb2_grpc.AgentServiceStub(channel).Kill(
            agents_pb2.KillRequest(reason="x"), timeout=10).receipts),
        "tail": lambda: [r.action.actor for r in actions_pb2_grpc.ActionServiceStub(channel).TailActions(
            actions_pb2.TailActionsRequest(), timeout=10)],
        "attach": lambda: [r.started.agent_id for r in agents_pb2_grpc.AgentServiceStub(channel).Attach(
            iter([agents_pb2.AttachRequest(stdin=b"a"), agents_pb2.AttachRequest(stdin=b"b")]), timeout=10)],
        "health": lambda: health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10).status,
        "unlisted": lambda: channel.unary_unary("/stockade.v1.Unlisted/Act")(b"", timeout=10).decode(),
    }
    answers = {}
    for name in sys.argv[2:]:
        try:
            answers[name] = calls[name]()
        except grpc.RpcError as error:
            answers[name] = error.code().name + ": " + error.details()
    print(json.dumps(answers))
""")


class System(system_pb2_grpc.SystemServiceServicer):
    async def Version(self, request: system_pb2.VersionRequest, context: object) -> system_pb2.VersionResponse:  # noqa: N802
        del request, context
        caller = current_caller()
        await asyncio.sleep(0)  # the caller stays this RPC's own across a switch of tasks
        assert current_caller() is caller
        return system_pb2.VersionResponse(version=f"{caller.actor} {caller.role.name} {caller.pid}")


class Actions(actions_pb2_grpc.ActionServiceServicer):
    async def TailActions(  # noqa: N802
        self, request: actions_pb2.TailActionsRequest, context: object
    ) -> AsyncIterator[actions_pb2.TailActionsResponse]:
        del request, context
        for _ in range(2):
            await asyncio.sleep(0)
            yield actions_pb2.TailActionsResponse(action=actions_pb2.Action(actor=current_caller().actor))


class Agents(agents_pb2_grpc.AgentServiceServicer):
    kills = 0

    async def Kill(self, request: agents_pb2.KillRequest, context: object) -> agents_pb2.KillResponse:  # noqa: N802
        del request, context
        self.kills += 1
        return agents_pb2.KillResponse()

    async def Attach(  # noqa: N802
        self, requests: AsyncIterator[agents_pb2.AttachRequest], context: object
    ) -> AsyncIterator[agents_pb2.AttachResponse]:
        del context
        async for request in requests:
            text = f"{current_caller().uid}:{request.stdin.decode()}"
            yield agents_pb2.AttachResponse(started=agents_pb2.AttachStarted(agent_id=text))


def as_user(user: int, groups: tuple[int, ...] = ()) -> list[str]:
    """The start of a command line that runs Python text as this user and in these groups alone."""
    listed = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={user}", f"--regid={user}", listed, sys.executable, "-I", "-c"]


class Served:
    def __init__(self, path: Path, door: FrontDoor, agents: Agents) -> None:
        self.path, self.door, self.agents = path, door, agents

    async def ask(self, *calls: str, user: int, groups: tuple[int, ...] = ()) -> dict[str, Any]:
        """What a process of this user and these groups gets from these calls."""
        process = await asyncio.create_subprocess_exec(
            *as_user(user, groups), CLIENT, str(self.path), *calls, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), CLIENT_SECONDS_MAX)
        assert process.returncode == 0, err.decode()
        answers = json.loads(out)
        assert isinstance(answers, dict)
        return answers


async def _unlisted(request: bytes, context: object) -> bytes:
    del request, context
    return b"reached"


@asynccontextmanager
async def served(
    tmp_path: Path, *, everyone_reads: bool = False, per_uid_max: int = 8, left: int = 0
) -> AsyncIterator[Served]:
    """A door and its server; a former daemon has `left` names of connections that it did not come to remove."""
    for directory in (tmp_path, *tmp_path.parents[:2]):  # pytest makes them for root alone
        directory.chmod(0o755)
    access = Access(
        operator_gids=frozenset({OPERATORS_GID}), reader_gids=frozenset({READERS_GID}), everyone_reads=everyone_reads
    )
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    for number in range(left):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(private / f"c{number + 1}"))
    control = tmp_path / "control.sock"
    door = FrontDoor(
        listening_socket(control, mode=0o666), private / "grpc.sock", access, connections_per_uid_max=per_uid_max
    )
    server = grpc.aio.server(interceptors=[CallerInterceptor(door.peers)])
    agents = Agents()
    system_pb2_grpc.add_SystemServiceServicer_to_server(System(), server)
    actions_pb2_grpc.add_ActionServiceServicer_to_server(Actions(), server)
    agents_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "stockade.v1.Unlisted", {"Act": grpc.unary_unary_rpc_method_handler(_unlisted)}
            ),
        )
    )
    server.add_insecure_port(f"unix:{private / 'grpc.sock'}")
    await server.start()
    door.start()
    try:
        yield Served(control, door, agents)
    finally:
        await door.close()
        await server.stop(None)
        assert list(private.glob("c*")) == []
        assert door.peers == {}


async def test_what_a_killed_daemon_left_keeps_nobody_out(tmp_path: Path) -> None:
    async with served(tmp_path, left=3) as api:
        for _ in range(4):
            assert (await api.ask("version", user=0))["version"].startswith("uid:0(root) ADMIN ")


async def test_each_caller_is_who_the_kernel_says(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        root = await api.ask("version", "tail", "attach", "health", "kill", user=0)
        operator = await api.ask("version", "tail", "attach", "kill", user=NOBODY, groups=(OPERATORS_GID,))
        reader = await api.ask("version", "tail", "health", user=ANYONE_UID, groups=(READERS_GID, 64999))
    assert root["version"].startswith("uid:0(root) ADMIN ")
    assert root["tail"] == ["uid:0(root)"] * 2
    assert root["attach"] == ["0:a", "0:b"]
    assert root["health"] == 1
    assert operator["version"].startswith(f"uid:{NOBODY}(nobody) OPERATOR ")
    assert operator["attach"] == [f"{NOBODY}:a", f"{NOBODY}:b"]
    assert reader["version"].startswith(f"uid:{ANYONE_UID}(?) READER ")
    assert reader["tail"] == [f"uid:{ANYONE_UID}(?)"] * 2
    assert api.agents.kills == 2


def test_it_works_on_uvloop_as_well(tmp_path: Path) -> None:
    async def ask() -> dict[str, Any]:
        async with served(tmp_path) as api:
            return await api.ask("version", "tail", "attach", user=NOBODY, groups=(OPERATORS_GID,))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answers = runner.run(ask())
    assert answers["version"].startswith(f"uid:{NOBODY}(nobody) OPERATOR ")
    assert answers["tail"] == [f"uid:{NOBODY}(nobody)"] * 2
    assert answers["attach"] == [f"{NOBODY}:a", f"{NOBODY}:b"]


async def test_a_reader_cannot_act(tmp_path: Path) -> None:
    async with served(tmp_path, everyone_reads=True) as api:
        answers = await api.ask("version", "kill", "attach", user=ANYONE_UID)
    assert answers["version"].startswith(f"uid:{ANYONE_UID}(?) READER ")
    assert answers["kill"].startswith("PERMISSION_DENIED: cannot call /stockade.v1.AgentService/Kill")
    assert answers["attach"].startswith("PERMISSION_DENIED: ")
    assert api.agents.kills == 0


async def test_who_has_no_role_is_not_served(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        answers = await api.ask("version", "kill", user=ANYONE_UID)
        assert (await api.ask("kill", user=ANYONE_UID, groups=(OPERATORS_GID,)))["kill"] == 0
    assert answers["version"].startswith("UNAVAILABLE: ")
    assert answers["kill"].startswith("UNAVAILABLE: ")
    assert api.agents.kills == 1


async def test_a_method_without_a_role_is_refused_even_to_root(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        assert (await api.ask("unlisted", user=0))["unlisted"].startswith("PERMISSION_DENIED: ")


async def test_who_goes_round_the_door_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as api, grpc.aio.insecure_channel(f"unix:{tmp_path}/private/grpc.sock") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await system_pb2_grpc.SystemServiceStub(channel).Version(system_pb2.VersionRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        # and another user does not even get that far
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(  # noqa: ASYNC221 - over in a moment
                ["/usr/bin/test", "-S", f"{tmp_path}/private/grpc.sock"], user=NOBODY, group=NOBODY, check=True
            )
        assert api.door.peers == {}


def _certificate(
    name: str, signer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return builder.sign(signer[1] if signer else key, hashes.SHA256()), key


def _pem(made: tuple[x509.Certificate, ec.EllipticCurvePrivateKey]) -> tuple[bytes, bytes]:
    """(key, certificate), the order gRPC takes them in."""
    key = made[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key, made[0].public_bytes(Encoding.PEM)


async def test_over_tcp_the_certificate_says_who_it_is() -> None:
    ours, foreign = _certificate("ca.test", None), _certificate("ca.test", None)
    trusted = ours[0].public_bytes(Encoding.PEM)
    server = grpc.aio.server(interceptors=[CallerInterceptor({}, {"cn:ci.test": Role.READER})])
    agents = Agents()
    system_pb2_grpc.add_SystemServiceServicer_to_server(System(), server)
    agents_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)
    secure = grpc.ssl_server_credentials([_pem(_certificate("localhost", ours))], trusted, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", secure)
    await server.start()

    async def answer(client: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None, call: str) -> str:
        key, chain = _pem(client) if client else (None, None)
        credentials = grpc.ssl_channel_credentials(trusted, key, chain)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            try:
                if call == "kill":
                    await agents_pb2_grpc.AgentServiceStub(channel).Kill(agents_pb2.KillRequest())
                    return "killed"
                stub = system_pb2_grpc.SystemServiceStub(channel)
                return str((await stub.Version(system_pb2.VersionRequest(), timeout=10)).version)
            except grpc.aio.AioRpcError as error:
                return error.code().name

    try:
        assert await answer(_certificate("ci.test", ours), "version") == "cn:ci.test READER -1"
        assert await answer(_certificate("ci.test", ours), "kill") == "PERMISSION_DENIED"
        assert await answer(_certificate("other.test", ours), "version") == "UNAUTHENTICATED"
        assert await answer(_certificate("ci.test", foreign), "version") == "UNAVAILABLE"
        assert await answer(None, "version") == "UNAVAILABLE"
        assert agents.kills == 0
    finally:
        await server.stop(None)


async def test_one_user_cannot_fill_the_door(tmp_path: Path) -> None:
    hold = textwrap.dedent("""
        import socket, sys
        held = []
        for _ in range(6):
            s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(5); held.append(s)
        print(sum(1 for s in held if s.recv(1) != b""), flush=True)   # gRPC greets whom it serves
        sys.stdin.read()
    """)
    async with served(tmp_path, everyone_reads=True, per_uid_max=4) as api:
        holder = await asyncio.create_subprocess_exec(
            *as_user(ANYONE_UID), hold, str(api.path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        assert await asyncio.wait_for(holder.stdout.readline(), CLIENT_SECONDS_MAX) == b"4\n"
        assert (await api.ask("version", user=ANYONE_UID))["version"].startswith("UNAVAILABLE: ")
        assert "READER" in (await api.ask("version", user=NOBODY))["version"]
        await asyncio.wait_for(holder.communicate(b""), CLIENT_SECONDS_MAX)  # closes its stdin
        async with asyncio.timeout(5):
            while api.door.peers:  # noqa: ASYNC110 - seen from outside: there is no event to wait for
                await asyncio.sleep(0.01)
        assert "READER" in (await api.ask("version", user=ANYONE_UID))["version"]


async def test_large_messages_pass_whole_both_ways(tmp_path: Path) -> None:
    async with served(tmp_path) as api, grpc.aio.insecure_channel(f"unix:{api.path}") as channel:
        stub = agents_pb2_grpc.AgentServiceStub(channel)

        async def ask() -> AsyncIterator[agents_pb2.AttachRequest]:
            for _ in range(8):
                yield agents_pb2.AttachRequest(stdin=b"x" * MEBIBYTE)

        sizes = []
        async for answer in stub.Attach(ask()):
            sizes.append(len(answer.started.agent_id))
            await asyncio.sleep(0.005)  # slower than the server: the buffers between fill up
    assert sizes == [MEBIBYTE + 2] * 8


async def test_the_socket_of_a_living_daemon_is_not_taken(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        with pytest.raises(Conflict, match="another daemon answers"):
            listening_socket(api.path)
        assert "ADMIN" in (await api.ask("version", user=0))["version"]
    assert api.path.is_socket()
    listening_socket(api.path).close()  # what a dead one left is


def test_what_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("precious")
    with pytest.raises(Conflict, match="no socket"):
        listening_socket(tmp_path / "control.sock")
    assert (tmp_path / "control.sock").read_text() == "precious"


def test_a_socket_passed_by_systemd_is_used(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from supervisord.door import listening_socket
        os.environ["LISTEN_PID"] = str(os.getpid())
        sock = listening_socket(Path("/nonexistent/control.sock"))
        print(sock.getsockname(), os.get_inheritable(3), "LISTEN_FDS" in os.environ)
    """)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "passed.sock"))
        listener.listen()
        done = subprocess.run(
            ["/bin/bash", "-c", f'exec "$0" -I -c "$1" 3<&{listener.fileno()}', sys.executable, script],
            env={"LISTEN_FDS": "1"}, pass_fds=[listener.fileno()], capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout == f"{tmp_path}/passed.sock False False\n", done.stderr
