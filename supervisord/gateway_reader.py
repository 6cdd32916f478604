"""[gateway] of stockade.toml read: models, guardrails, MCP servers, hosts and networks (pure)."""

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from gateway_client.egress.mcpcall import SERVER_NAME
from gateway_client.gateways.guardrails.builtin import BY_NAME, SETS
from gateway_client.gateways.guardrails.pattern import BadPattern, read_pieces
from supervisord.config import (
    GatewayConfig,
    GatewayKind,
    Guardrail,
    GuardrailAction,
    GuardrailDirection,
    McpServer,
    ModelKind,
    ModelRoute,
    Network,
)
from supervisord.endpoints import is_endpoint, read_url
from supervisord.ids import shown
from supervisord.tables import Table

MODELS_MAX: Final = 256
HOSTS_MAX: Final = 4096
GUARDRAILS_MAX: Final = 64
PATTERNS_MAX: Final = 64
MCP_SERVERS_MAX: Final = 64
USD_PER_MTOK_MAX: Final = 1_000_000

_MODEL_GLOB: Final = re.compile(r"[A-Za-z0-9._:/@+*-]{1,200}", re.ASCII)
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_][a-z0-9_-]{0,62})*", re.ASCII)
_GUARDRAIL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", re.ASCII)
_PATTERN_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_MODEL_KEYS: Final = {
    "url": (ModelKind.OPENAI, ModelKind.ANTHROPIC),
    "model": (ModelKind.OPENAI, ModelKind.ANTHROPIC),
    "key_file": (ModelKind.OPENAI, ModelKind.ANTHROPIC),
    "responses": (ModelKind.OPENAI,),
    "script": (ModelKind.SCRIPTED,),
    "path": (ModelKind.LOCAL,),
    "context_tokens": (ModelKind.LOCAL,),
}


def read_gateway(table: Table) -> GatewayConfig:
    """Gives what [gateway] says; problems are in the findings of the table."""
    kind = table.one_of("kind", GatewayKind.EMBEDDED)
    gateway = GatewayConfig(
        kind=kind,
        url=read_url(table, "url", GatewayConfig().url),
        credential_file=table.path("credential_file", None),
        forward_proxy=read_url(table, "forward_proxy", ""),
        models=tuple(_model(entry) for entry in table.tables("models", MODELS_MAX)),
        guardrails=tuple(_guardrail(entry) for entry in table.tables("guardrails", GUARDRAILS_MAX)),
        mcp=tuple(_mcp(entry) for entry in table.tables("mcp", MCP_SERVERS_MAX)),
        hosts=_hosts(table.table("hosts")),
        probe_seconds=table.number("probe_seconds", None, 0.1, 3600) or GatewayConfig().probe_seconds,
        allow_networks=_networks(table),
        ca_file=table.path("ca_file", None),
    )
    if kind is not GatewayKind.EMBEDDED:
        if not gateway.url:
            table.problem("url", f"is empty, and kind {kind.value} needs it", "say where the gateway listens")
        for key in ("models", "guardrails", "mcp", "hosts", "allow_networks"):
            if table.values.get(key):
                table.problem(key, f"is for the embedded gateway, and kind is {kind.value}", "remove it")
    table.end()
    return gateway


def _model(table: Table) -> ModelRoute:
    kind = table.one_of("kind", ModelKind.SCRIPTED)
    route = ModelRoute(
        name=table.matching("name", "", _MODEL_GLOB, "a model's name or a glob such as gpt-*"),
        kind=kind,
        url=read_url(table, "url", ""),
        model=table.matching("model", "", _MODEL_GLOB, "a model's name"),
        key_file=table.path("key_file", None),
        script=table.path("script", None),
        listed=_listed(table),
        responses=table.flag("responses", default=True),
        path=table.path("path", None),
        context_tokens=table.whole("context_tokens", 4096, 256, 10_000_000),
        input_usd_per_mtok=table.number("input_usd_per_mtok", None, 0, USD_PER_MTOK_MAX),
        output_usd_per_mtok=table.number("output_usd_per_mtok", None, 0, USD_PER_MTOK_MAX),
    )
    if not route.name:
        table.problem("name", "is missing", 'add name = "MODEL-GLOB"')
    if not route.url and kind in (ModelKind.OPENAI, ModelKind.ANTHROPIC):
        table.problem("url", f"is missing, and kind {kind.value} needs it", "add the provider's base URL")
    for key, owners in _MODEL_KEYS.items():
        if key in table.values and kind not in owners:
            listed = " and ".join(owner.value for owner in owners)
            table.problem(key, f"is for kind {listed}, and kind is {kind.value}", "remove it")
    if (route.input_usd_per_mtok is None) != (route.output_usd_per_mtok is None):
        table.problem("input_usd_per_mtok", "and output_usd_per_mtok go together", "give both or neither")
    table.end()
    return route


def _listed(table: Table) -> tuple[str, ...]:
    value = table.get("listed")
    if value is None:
        return ()
    names = value if isinstance(value, list) and len(value) <= MODELS_MAX else [None]
    if not all(isinstance(name, str) and _MODEL_GLOB.fullmatch(name) and "*" not in name for name in names):
        table.problem("listed", "is not a list of models' names", 'write listed = ["gpt-x"]')
        return ()
    return tuple(str(name) for name in names)


def _mcp(table: Table) -> McpServer:
    server = McpServer(
        name=table.matching("name", "", SERVER_NAME, "a name of letters, digits and ._-"),
        url=read_url(table, "url", ""),
        credential_file=table.path("credential_file", None),
    )
    for key in ("name", "url"):
        if not getattr(server, key):
            table.problem(key, "is missing", f'add {key} = "…"')
    table.end()
    return server


def _guardrail(table: Table) -> Guardrail:
    own_table = table.table("own")
    own = {name: own_table.text(name, "") for name in list(own_table.values)[:PATTERNS_MAX]}
    for name, text in own.items():
        if _PATTERN_NAME.fullmatch(name) is None or name in (*SETS, *BY_NAME):
            own_table.problem(name, "is no name for a pattern, or one that exists", "write small letters, digits and _")
        try:
            read_pieces(text)
        except BadPattern as error:
            own_table.problem(name, str(error), "docs/POLICY.md has the language of patterns")
    patterns = _texts(table, "patterns", _PATTERN_NAME, ())
    for name in patterns:
        if name not in SETS and name not in BY_NAME:
            table.problem("patterns", f"has {name}, which is none", f"known are {', '.join((*SETS, *BY_NAME))}")
    if not patterns and not own:
        table.problem("patterns", "and own are empty: nothing would be looked for", 'add patterns = ["secrets"]')
    guardrail = Guardrail(
        name=table.matching("name", "", _GUARDRAIL_NAME, "a name of letters, digits, - and _"),
        action=table.one_of("action", GuardrailAction.BLOCK),
        direction=table.one_of("direction", GuardrailDirection.BOTH),
        patterns=patterns,
        own=own,
        models=_texts(table, "models", _MODEL_GLOB, ("*",)),
    )
    if not guardrail.name:
        table.problem("name", "is missing", 'add name = "no-secrets"')
    table.end()
    return guardrail


def _texts(table: Table, key: str, form: re.Pattern[str], default: tuple[str, ...]) -> tuple[str, ...]:
    value = table.get(key)
    if value is None:
        return default
    items = value if isinstance(value, list) and len(value) <= PATTERNS_MAX else [None]
    if not all(isinstance(item, str) and form.fullmatch(item) for item in items):
        table.problem(key, f"is not a list of up to {PATTERNS_MAX} names", f'write {key} = ["…"]')
        return default
    return tuple(str(item) for item in items)


def _hosts(table: Table) -> Mapping[str, str]:
    if len(table.values) > HOSTS_MAX:
        table.findings.add(table.name, f"has more than {HOSTS_MAX} names", "remove some")
    hosts: dict[str, str] = {}
    for name in table.values:
        address = table.text(name, "")
        if _HOST.fullmatch(name) is None:
            table.problem(name, "is not a host's name in lower case", 'quote one with dots: "a.example.com" = "…"')
        elif not is_endpoint(address, port_required=False):
            table.problem(name, f"{shown(address)} is neither IP nor IP:PORT", "write for example 10.0.0.5:8080")
        hosts[name] = address
    return hosts


def _networks(table: Table) -> tuple[Network, ...]:
    value = table.get("allow_networks")
    if value is None:
        return ()
    if not isinstance(value, list):
        table.problem("allow_networks", "is not a list of networks", 'write ["10.1.0.0/16"]')
        return ()
    networks: list[Network] = []
    for index, item in enumerate(value):
        try:
            networks.append(ipaddress.ip_network(str(item)))
        except ValueError:
            table.problem(f"allow_networks[{index}]", f"{shown(str(item))} is not a network", "write say 10.1.0.0/16")
    return tuple(networks)
