"""The embedded gateway's configuration: one JSON document, read once from a descriptor.

The keys of providers are in it, so it is never on a command line, in the environment or in a log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from gateway_client.gateways.embedded.http_client import Url
from gateway_client.gateways.embedded.models import script as scripts
from gateway_client.gateways.guardrails.pattern import BadPattern, Pattern
from gateway_client.gateways.guardrails.rules import Action, Direction, Rule, patterns_of
from gateway_client.gateways.prices import Price

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway_client.gateways.embedded.addresses import Address, Network
    from gateway_client.gateways.embedded.models.script import Script

CONFIG_BYTES_MAX: Final = 4 * 1024 * 1024
PORT_MAX: Final = 65535

Kind = Literal["scripted", "local", "openai", "anthropic"]


class ConfigError(ValueError):
    """A configuration that cannot be used; names the key and what is expected."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    name: str
    kind: Kind
    listed: tuple[str, ...] = ()
    price: Price | None = None
    script: str = ""
    url: Url | None = None
    key: str = field(default="", repr=False)
    model: str = ""
    responses: bool = True
    path: str = ""
    context_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class McpServer:
    name: str
    url: Url
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Pin:
    """Where the operator says a name is; port None keeps the one asked for."""

    address: Address
    port: int | None


@dataclass(frozen=True, slots=True)
class Config:
    socket_path: Path
    allowed_uid: int
    user: str | None
    models: tuple[ModelConfig, ...]
    scripts: Mapping[str, Script]
    hosts: Mapping[str, Pin]
    allow_networks: tuple[Network, ...]
    guardrails: tuple[Rule, ...] = ()
    mcp: tuple[McpServer, ...] = ()


_KEYS: Final = {
    "socket_path",
    "allowed_uid",
    "user",
    "models",
    "scripted",
    "hosts",
    "allow_networks",
    "guardrails",
    "mcp",
}
_MODEL_KEYS: Final = {
    "scripted": {"script"},
    "local": {"path", "context_tokens"},
    "openai": {"url", "key", "model", "responses"},
    "anthropic": {"url", "key", "model"},
}
_COMMON_KEYS: Final = {"name", "kind", "listed", "price"}

DEFAULT_MODELS: Final = (
    ModelConfig("stockade-scripted", "scripted"),
    ModelConfig("*", "scripted"),
)
"""Without any model configured every name is answered by the scripted model: an offline trial of any agent."""


def parse(text: str | bytes) -> Config:
    """Return the configuration in a JSON document; raises ConfigError."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read gateway config: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("cannot read gateway config: expected an object")
    _known(value, _KEYS, "gateway config")
    scripted = {
        name: _script(script, f"scripted.{name}")
        for name, script in _object(value, "scripted", "gateway config").items()
    }
    models = tuple(_model(item, f"models[{index}]", scripted) for index, item in enumerate(_list(value, "models")))
    hosts = _object(value, "hosts", "gateway config")
    return Config(
        socket_path=Path(_text(value, "socket_path", "gateway config")),
        allowed_uid=_integer(value, "allowed_uid", "gateway config"),
        user=_text(value, "user", "gateway config") if value.get("user") is not None else None,
        models=models or DEFAULT_MODELS,
        scripts=scripted,
        hosts={name.lower().rstrip("."): _pin(pin, f"hosts.{name}") for name, pin in hosts.items()},
        allow_networks=tuple(
            _network(item, f"allow_networks[{index}]") for index, item in enumerate(_list(value, "allow_networks"))
        ),
        mcp=tuple(_mcp(item, f"mcp[{index}]") for index, item in enumerate(_list(value, "mcp"))),
        guardrails=tuple(
            _guardrail(item, f"guardrails[{index}]") for index, item in enumerate(_list(value, "guardrails"))
        ),
    )


def _known(value: dict[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(value.keys() - keys)
    if unknown:
        raise ConfigError(f"cannot read {where}: unknown key {unknown[0]}; known are {', '.join(sorted(keys))}")


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"cannot read {where}: {key} must be a string")
    return text


def _integer(value: dict[str, Any], key: str, where: str) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"cannot read {where}: {key} must be a number")
    return number


def _list(value: dict[str, Any], key: str) -> list[Any]:
    items = value.get(key, [])
    if not isinstance(items, list):
        raise ConfigError(f"cannot read gateway config: {key} must be a list")
    return items


def _object(value: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    items = value.get(key, {})
    if not isinstance(items, dict):
        raise ConfigError(f"cannot read {where}: {key} must be an object")
    return items


def _script(value: object, where: str) -> Script:
    try:
        return scripts.parse(value, where)
    except scripts.ScriptError as error:
        raise ConfigError(str(error)) from error


def _model(value: object, where: str, scripted: Mapping[str, Script]) -> ModelConfig:
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {where}: expected an object")
    kind = value.get("kind")
    if kind not in _MODEL_KEYS:
        raise ConfigError(f"cannot read {where}: kind must be one of {', '.join(_MODEL_KEYS)}")
    _known(value, _COMMON_KEYS | _MODEL_KEYS[kind], where)
    listed = value.get("listed", [])
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"cannot read {where}: listed must be a list of names")
    script = value.get("script", "")
    if script and script not in scripted:
        raise ConfigError(f"cannot read {where}: there is no script {script!r} under scripted")
    url = None
    if kind in ("openai", "anthropic"):
        try:
            url = Url.parse(_text(value, "url", where))
        except ValueError as error:
            raise ConfigError(f"cannot read {where}: {error}") from error
    key = value.get("key", "")
    if not isinstance(key, str) or not key.isascii() or not key.isprintable():
        raise ConfigError(f"cannot read {where}: key must be one line of printable ASCII")
    return ModelConfig(
        name=_text(value, "name", where),
        kind=kind,
        listed=tuple(listed),
        price=_price(value.get("price"), where),
        script=script,
        url=url,
        key=key,
        model=str(value.get("model", "")),
        responses=value.get("responses", True) is True,
        path=str(value.get("path", "")),
        context_tokens=_integer(value, "context_tokens", where) if "context_tokens" in value else 4096,
    )


def _mcp(value: object, where: str) -> McpServer:
    match value:
        case {"name": str(name), "url": str(url), "key": str(key), **rest} if not rest and key.isascii():
            try:
                return McpServer(name, Url.parse(url), key)
            except ValueError as error:
                raise ConfigError(f"cannot read {where}: {error}") from error
    raise ConfigError(f"cannot read {where}: expected name, url and key")


def _guardrail(value: object, where: str) -> Rule:
    match value:
        case {
            "name": str(name), "direction": "request" | "response" | "both" as direction,
            "action": "block" | "mask" as action, "patterns": list(names), "own": dict(own), "models": list(models),
            **rest
        } if not rest:  # fmt: skip
            try:
                patterns = patterns_of([str(each) for each in names], [Pattern(str(k), str(v)) for k, v in own.items()])
            except (LookupError, BadPattern) as error:
                raise ConfigError(f"cannot read {where}: {error}") from error
            directions = frozenset(Direction) if direction == "both" else frozenset({Direction(direction)})
            return Rule(name, directions, Action(action), patterns, tuple(map(str, models)))
    raise ConfigError(f"cannot read {where}: expected name, direction, action, patterns, own and models")


def _price(value: object, where: str) -> Price | None:
    match value:
        case None:
            return None
        case {"input_usd_per_mtok": int() | float() as given, "output_usd_per_mtok": int() | float() as taken, **rest}:
            if not rest and given >= 0 and taken >= 0:
                return Price(float(given), float(taken))
    raise ConfigError(f"cannot read {where}: price must be input_usd_per_mtok and output_usd_per_mtok")


def _pin(value: object, where: str) -> Pin:
    try:
        if not isinstance(value, str):
            raise TypeError("not a string")
        if value.count(":") == 1 or value.startswith("["):
            host, _, port = value.rpartition(":")
            if not 1 <= int(port) <= PORT_MAX:
                raise ValueError("no such port")
            return Pin(ip_address(host.strip("[]")), int(port))
        return Pin(ip_address(value), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {where}: expected an address or address:port: {error}") from error


def _network(value: object, where: str) -> Network:
    try:
        return ip_network(str(value))
    except ValueError as error:
        raise ConfigError(f"cannot read {where}: expected a network such as 10.1.0.0/16: {error}") from error
