"""Where allowed requests leave: the configured gateway as worker and dialer are told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gateway_client.egress import messages
from supervisord.config import Config, GatewayKind
from supervisord.errors import InvalidInput
from supervisord.gateway_process import read_secret, socket_path
from supervisord.policy_reader import HOLD_SECONDS_MAX

if TYPE_CHECKING:
    from urllib.parse import SplitResult

ANSWER_SLACK_SECONDS: Final = 15.0
PORTS: Final = {"http": 80, "https": 443}


def worker_configuration(config: Config) -> messages.Configure:
    """What a worker needs to know to speak to the gateway; the credential is in this message and nowhere else."""
    # Where a human answers, the daemon does: the worker must wait longer than people are given.
    limits = messages.Limits(answer_seconds_max=HOLD_SECONDS_MAX + ANSWER_SLACK_SECONDS)
    gateway = config.gateway
    if gateway.kind is GatewayKind.EMBEDDED:
        return messages.Configure(
            gateway=gateway.kind.value,
            host="gateway.internal",
            forward_mode=messages.ForwardMode.PREFACE,
            limits=limits,
        )
    url = _url(gateway.url, "gateway.url")
    return messages.Configure(
        gateway=gateway.kind.value,
        host=url.netloc,
        base_path=url.path.rstrip("/").removesuffix("/v1"),
        credential="" if gateway.credential_file is None else read_secret(gateway.credential_file),
        tls_server_name=url.hostname if url.scheme == "https" else None,
        forward_mode=messages.ForwardMode.PROXY if gateway.forward_proxy else messages.ForwardMode.NONE,
        limits=limits,
    )


def dialer_configuration(config: Config) -> messages.ConfigureDialer:
    """The one or two places the dialer ever connects to."""
    gateway = config.gateway
    if gateway.kind is GatewayKind.EMBEDDED:
        return messages.ConfigureDialer(gateway=f"unix:{socket_path(config)}")
    proxy = gateway.forward_proxy
    return messages.ConfigureDialer(
        gateway=_address(_url(gateway.url, "gateway.url")),
        forward_proxy=_address(_url(proxy, "gateway.forward_proxy")) if proxy else "",
    )


def _url(text: str, key: str) -> SplitResult:
    url = urlsplit(text)
    if url.scheme not in PORTS or not url.hostname or url.username or url.query or url.fragment:
        raise InvalidInput(f"cannot use {key} {text}: it is not http(s)://host[:port][/path]", remedy="correct it")
    return url


def _address(url: SplitResult) -> str:
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return f"{host}:{url.port or PORTS[url.scheme]}"
