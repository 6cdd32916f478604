"""The API as it is served: the control socket behind the front door, and TCP with mutual TLS where configured."""

from __future__ import annotations

import grp
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from supervisord.callers import Access, CallerInterceptor, Role
from supervisord.door import FrontDoor, listening_socket
from supervisord.errors import InvalidInput
from supervisord.rpc.errors import ErrorInterceptor

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from supervisord.config import Config

MESSAGE_BYTES_MAX: Final = 4 << 20
STREAMS_PER_CONNECTION_MAX: Final = 256


def control_listener(config: Config) -> socket.socket:
    """The control socket, for whoever the configuration lets in; raises StockadeError."""
    mode = 0o666 if config.control.read_only_others else 0o660
    return listening_socket(config.run_dir / "control.sock", mode=mode, gid=_group_id(config))


class Api:
    """A gRPC server with what `register` adds to it; `interceptors` come after those that name the caller."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        register: Callable[[grpc.aio.Server], None],
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]  # generic in the stubs only
    ) -> None:
        group = _group_id(config)
        self._config = config
        self._private = config.run_dir / "private" / "api.sock"
        self._door = FrontDoor(
            listener,
            self._private,
            Access(
                operator_gids=frozenset() if group < 0 else frozenset({group}),
                everyone_reads=config.control.read_only_others,
            ),
        )
        roles = {name: Role[role.name] for name, role in config.control.roles.items()}
        self._server = grpc.aio.server(
            interceptors=[CallerInterceptor(self._door.peers, roles), ErrorInterceptor(), *interceptors],
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
                ("grpc.so_reuseport", 0),
            ],
        )
        register(self._server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # there, and not in its stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, *, serving: bool = True) -> None:
        """Accept callers; `serving` is what health checks are told."""
        self._private.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._private}")
        if self._config.control.tcp_listen:
            self._server.add_secure_port(self._config.control.tcp_listen, _server_credentials(self._config))
        await self._server.start()
        status = health_pb2.HealthCheckResponse
        await self._health.set("", status.SERVING if serving else status.NOT_SERVING)
        self._door.start()

    async def announce_end(self) -> None:
        await self._health.enter_graceful_shutdown()

    async def close(self, seconds: float) -> None:
        await self._door.close()
        await self._server.stop(seconds)


def _server_credentials(config: Config) -> grpc.ServerCredentials:
    """Mutual TLS: a client without a certificate of the configured authority gets no connection."""
    control = config.control
    if control.tls_cert is None or control.tls_key is None or control.tls_client_ca is None:
        raise InvalidInput(
            "cannot serve control.tcp_listen: tls_cert, tls_key and tls_client_ca are needed with it",
            remedy="set all three in [control]",
        )
    try:
        pair = (control.tls_key.read_bytes(), control.tls_cert.read_bytes())
        authority = control.tls_client_ca.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot serve control.tcp_listen: {error}", remedy="correct [control]") from error
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)


def _group_id(config: Config) -> int:
    if not config.control.group:
        return -1
    try:
        return grp.getgrnam(config.control.group).gr_gid
    except KeyError as error:
        raise InvalidInput(
            f"cannot serve the control socket: there is no group {config.control.group}",
            remedy='run `./bootstrap setup`, or set control.group = "" to serve root alone',
        ) from error
