"""stockade.toml read: every key known, every value checked, every problem with its line (only load_config does I/O)."""

import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from gateway_client.egress.mcpcall import SERVER_NAME
from gateway_client.gateways.guardrails.builtin import BY_NAME, SETS
from gateway_client.gateways.guardrails.pattern import BadPattern, read_pieces
from sandbox.images.limits import ImageLimits
from supervisord.budgets import BOUNDS, NO_BUDGET, TIMES, LabelBudget, Period, parse_budget
from supervisord.config import (
    UID_FIRST,
    UID_LAST,
    UIDS_PER_AGENT,
    AgentsConfig,
    Config,
    ControlConfig,
    GatewayConfig,
    GatewayKind,
    Guardrail,
    GuardrailAction,
    GuardrailDirection,
    LogConfig,
    McpServer,
    ModelKind,
    ModelRoute,
    Network,
    OnStop,
    RequestsConfig,
    Role,
    ScratchConfig,
    SinkConfig,
    SinkKind,
    UsersConfig,
)
from supervisord.documents import PROBLEMS_MAX, InvalidDocument, Position, Problem
from supervisord.errors import InvalidInput, StockadeError
from supervisord.ids import instance_name, label, shown
from supervisord.sizes import format_size, parse_duration, parse_size
from supervisord.tables import Findings, Table

M = TypeVar("M", int, float)

CONFIG_BYTES_MAX: Final = 256 * 1024
MODELS_MAX: Final = 256
HOSTS_MAX: Final = 4096
GUARDRAILS_MAX: Final = 64
PATTERNS_MAX: Final = 64
MCP_SERVERS_MAX: Final = 64
SINKS_MAX: Final = 8
_SINK_FILES: Final = ("header_file", "ca_file", "cert_file", "key_file")
LABEL_BUDGETS_MAX: Final = 256
USD_PER_MTOK_MAX: Final = 1_000_000
PORT_MAX: Final = 65535

# sockaddr_un has 108 bytes for a path (unix(7)); the private sockets below run_dir have names of up to 45.
RUN_DIR_BYTES_MAX: Final = 60

_ACCOUNT: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_MODEL_GLOB: Final = re.compile(r"[A-Za-z0-9._:/@+*-]{1,200}", re.ASCII)
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_][a-z0-9_-]{0,62})*", re.ASCII)
_SINK_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)
_SYSLOG: Final = re.compile(
    r"unix:/[!-~]{1,100}|(udp|tcp):[A-Za-z0-9._-]{1,253}:[0-9]{1,5}|(udp|tcp):\[[0-9a-f:.]+\]:[0-9]{1,5}", re.ASCII
)
_IDENTITY: Final = re.compile(
    r"cn:[^\x00-\x1f\x7f]{1,200}|spiffe://[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255}){0,16}"
)
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


def load_config(path: Path) -> Config:
    """Reads the configuration file; raises InvalidInput."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", remedy="pass --config FILE") from error
    if len(data) > CONFIG_BYTES_MAX:
        raise InvalidInput(f"cannot read {path}: longer than {CONFIG_BYTES_MAX} bytes", remedy="shorten it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"cannot read {path}: byte {error.start} is not UTF-8", remedy="save it as UTF-8") from error
    return parse_config(text, source=str(path))


def _not_toml(source: str, said: str) -> Problem:
    """What tomllib said, with its place where every other problem has it."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", said)
    position = None if found is None else Position(int(found[1]), int(found[2]))
    return Problem(source, position, "", f"not TOML: {said if found is None else said[: found.start()]}")


def parse_config(text: str, *, source: str) -> Config:
    """Gives the configuration of a TOML text; raises InvalidDocument with every problem, each with its line."""
    try:
        root = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidDocument("configuration", [_not_toml(source, str(error))]) from error
    except RecursionError as error:
        raise InvalidDocument("configuration", [Problem(source, None, "", "nested too deeply")]) from error
    findings = Findings(source, text)
    config = _config(Table(findings, "", root), source)
    if findings.problems:
        in_order = sorted(findings.problems, key=lambda problem: problem.position.line if problem.position else 0)
        raise InvalidDocument("configuration", in_order[:PROBLEMS_MAX])
    return config


def missing_files(config: Config) -> tuple[str, ...]:
    """Gives one line for every file that the configuration names and that is not there; for `stockaded --check`."""
    gateway, control = config.gateway, config.control
    named: list[tuple[str, Path | None]] = []
    if gateway.kind is not GatewayKind.EMBEDDED:
        named.append(("gateway.credential_file", gateway.credential_file))
    named.append(("gateway.ca_file", gateway.ca_file))
    for index, server in enumerate(gateway.mcp):
        named.append((f"gateway.mcp[{index}].credential_file", server.credential_file))
    for index, route in enumerate(gateway.models):
        named.append((f"gateway.models[{index}].key_file", route.key_file))
        named.append((f"gateway.models[{index}].script", route.script))
        named.append((f"gateway.models[{index}].path", route.path))
    if config.requests.webhook_url:
        named.append(("requests.webhook_secret_file", config.requests.webhook_secret_file))
    for index, sink in enumerate(config.log.sinks):
        named.extend((f"log.sinks[{index}].{key}", getattr(sink, key)) for key in _SINK_FILES)
    if control.tcp_listen:
        named.extend((f"control.{key}", getattr(control, key)) for key in ("tls_cert", "tls_key", "tls_client_ca"))
    return tuple(
        f"cannot use {key} of {config.source}: there is no file {path}; make it or correct the path"
        for key, path in named
        if path is not None and not path.is_file()
    )


def _config(root: Table, source: str) -> Config:
    instance = root.text("instance", "default")
    try:
        instance_name(instance)
    except StockadeError as error:
        root.problem("instance", error.message, error.remedy)
    default = Config()
    run_dir = root.path("run_dir", default.run_dir)
    state_dir = root.path("state_dir", default.state_dir)
    for key, path in (("run_dir", run_dir), ("state_dir", state_dir)):
        if path is None or path == Path("/"):
            root.problem(key, "is empty or /", "name a directory for Stockade alone")
    if run_dir is not None and len(str(run_dir).encode()) > RUN_DIR_BYTES_MAX:
        root.problem("run_dir", f"is longer than {RUN_DIR_BYTES_MAX} bytes: sockets in it would not fit", "shorten it")
    if run_dir is not None and run_dir == state_dir:
        root.problem("run_dir", "is state_dir too", "name two directories: a reboot empties one of them")
    pool, egress = root.table("pool"), root.table("egress")
    config = Config(
        instance=instance,
        state_dir=state_dir or default.state_dir,
        run_dir=run_dir or default.run_dir,
        policy_dirs=_policy_dirs(root, default.policy_dirs),
        gateway=_gateway(root.table("gateway")),
        log=_log(root.table("log")),
        control=_control(root.table("control")),
        requests=_requests(root.table("requests")),
        users=_users(root.table("users")),
        agents=_agents(root.table("agents")),
        scratch=_scratch(root.table("scratch")),
        images=_images(root.table("images")),
        budgets=_budgets(root),
        pool_netns=pool.whole("netns", default.pool_netns, 0, 256),
        pool_images=pool.whole("images", default.pool_images, 0, 64),
        egress_workers=egress.whole("workers", default.egress_workers, 1, 64),
        source=source,
    )
    for table in (pool, egress, root):
        table.end()
    return config


def _policy_dirs(root: Table, default: tuple[Path, ...]) -> tuple[Path, ...]:
    value = root.get("policy_dirs")
    if value is None:
        return default
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        root.problem("policy_dirs", "is not a list of paths", 'write policy_dirs = ["/etc/stockade/policies"]')
        return default
    return tuple(root.absolute(f"policy_dirs[{index}]", item) for index, item in enumerate(value))


def _gateway(table: Table) -> GatewayConfig:
    kind = table.one_of("kind", GatewayKind.EMBEDDED)
    gateway = GatewayConfig(
        kind=kind,
        url=_url(table, "url", GatewayConfig().url),
        credential_file=table.path("credential_file", None),
        forward_proxy=_url(table, "forward_proxy", ""),
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


def _url(table: Table, key: str, default: str) -> str:
    text = table.text(key, default)
    if not text:
        return text
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, fits = urlsplit(""), False
    plain = re.fullmatch(r"[!-~]+", text) is not None and not {"\\", "#", "?", "@"} & set(text)
    if not fits or not plain or parts.username is not None:
        table.problem(key, f"{shown(text)} is not http(s)://HOST[:PORT][/PATH]", "no user, query or fragment in it")
    return text


def _model(table: Table) -> ModelRoute:
    kind = table.one_of("kind", ModelKind.SCRIPTED)
    route = ModelRoute(
        name=table.matching("name", "", _MODEL_GLOB, "a model's name or a glob such as gpt-*"),
        kind=kind,
        url=_url(table, "url", ""),
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
        url=_url(table, "url", ""),
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


def is_endpoint(text: str, *, port_required: bool) -> bool:
    """Tells whether the text is `IP:PORT`, `[IP6]:PORT` or, where the port may be left out, a bare address."""
    if not port_required and _is_address(text):
        return True
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return False
    digits = port.isascii() and port.isdigit() and len(port) <= len(str(PORT_MAX))
    return bool(colon) and _is_address(host) and digits and 1 <= int(port) <= PORT_MAX


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


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


def _log(table: Table) -> LogConfig:
    default = LogConfig()
    log = LogConfig(
        durability=table.one_of("durability", default.durability),
        checkpoint_entries=table.whole("checkpoint_entries", default.checkpoint_entries, 1, 1_000_000),
        checkpoint_seconds=table.number("checkpoint_seconds", None, 1, 86400) or default.checkpoint_seconds,
        witness_dir=table.path("witness_dir", None),
        keep_days=table.whole("keep_days", default.keep_days, 0, 36_500),
        keep_bytes=_measure(table, "keep_bytes", default.keep_bytes, parse_size),
        sinks=tuple(_sink(entry) for entry in table.tables("sinks", SINKS_MAX)),
    )
    names = [sink.name for sink in log.sinks]
    if len(set(names)) != len(names):
        table.problem("sinks", "has two of one name", "rename one: a sink's cursor goes by its name")
    table.end()
    return log


def _sink(table: Table) -> SinkConfig:
    kind = table.one_of("kind", SinkKind.JSONL)
    sink = SinkConfig(
        name=table.matching("name", "", _SINK_NAME, "a sink's name, in lower case"),
        kind=kind,
        path=table.path("path", None),
        address=table.text("address", ""),
        url=_url(table, "url", ""),
        header_file=table.path("header_file", None),
        tls=table.flag("tls", default=False),
        ca_file=table.path("ca_file", None),
        cert_file=table.path("cert_file", None),
        key_file=table.path("key_file", None),
    )
    if not sink.name:
        table.problem("name", "is missing", "name the sink: its cursor goes by it")
    if sink.address and _SYSLOG.fullmatch(sink.address) is None:
        table.problem(
            "address", f"{shown(sink.address)} is not unix:/PATH, udp:HOST:PORT or tcp:HOST:PORT", "say where"
        )
    needed = {SinkKind.JSONL: "path", SinkKind.OCSF: "path", SinkKind.SYSLOG: "address", SinkKind.OTLP: "url"}[kind]
    for key in ("path", "address", "url"):
        given = bool(getattr(sink, key))
        if given != (key == needed):
            what = f"is missing, and kind {kind.value} needs it" if key == needed else f"is not for kind {kind.value}"
            table.problem(key, what, "correct the sink")
    if sink.header_file is not None and kind is not SinkKind.OTLP:
        table.problem("header_file", f"is not for kind {kind.value}", "remove it")
    _check_sink_tls(table, sink)
    table.end()
    return sink


def _check_sink_tls(table: Table, sink: SinkConfig) -> None:
    https = sink.url.lower().startswith("https:")
    over_tls = sink.tls or https
    if sink.tls and not https and not sink.address.startswith("tcp:"):
        table.problem("tls", "is for tcp: addresses and https: URLs", "correct the address, or remove it")
    for key in ("ca_file", "cert_file", "key_file"):
        if getattr(sink, key) is not None and not over_tls:
            table.problem(key, "is for a sink over TLS", "say tls = true, or remove it")
    if (sink.cert_file is None) != (sink.key_file is None):
        missing = "cert_file" if sink.cert_file is None else "key_file"
        table.problem(missing, "is missing: a client certificate is two files", "name both, or none")


def _control(table: Table) -> ControlConfig:
    roles_table = table.table("roles")
    roles: dict[str, Role] = {}
    for identity in roles_table.values:
        roles[identity] = roles_table.one_of(identity, Role.READER)
        if _IDENTITY.fullmatch(identity) is None:
            roles_table.problem(identity, "is neither cn:NAME nor a spiffe:// URI", 'write "cn:NAME" = "operator"')
    control = ControlConfig(
        group=table.matching("group", "stockade", _ACCOUNT, "a group's name"),
        read_only_others=table.flag("read_only_others", default=False),
        tcp_listen=table.text("tcp_listen", ""),
        tls_cert=table.path("tls_cert", None),
        tls_key=table.path("tls_key", None),
        tls_client_ca=table.path("tls_client_ca", None),
        roles=roles,
    )
    if control.tcp_listen:
        if not is_endpoint(control.tcp_listen, port_required=True):
            table.problem("tcp_listen", f"{shown(control.tcp_listen)} is not IP:PORT", "write say 127.0.0.1:7443")
        for key in ("tls_cert", "tls_key", "tls_client_ca"):
            if getattr(control, key) is None:
                table.problem(key, "is missing, and tcp_listen needs it", "TCP is served with mutual TLS only")
        if not roles:
            table.problem("roles", "is missing: nobody could do anything over TCP", "add [control.roles]")
    table.end()
    return control


def _requests(table: Table) -> RequestsConfig:
    requests = RequestsConfig(
        webhook_url=_url(table, "webhook_url", ""), webhook_secret_file=table.path("webhook_secret_file", None)
    )
    if requests.webhook_url:
        parts = urlsplit(requests.webhook_url)
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            table.problem("webhook_url", "is http: beyond this host", "use https: what agents ask would be readable")
        if requests.webhook_secret_file is None:
            table.problem("webhook_secret_file", "is missing, and webhook_url needs it", "name a file with the key")
    table.end()
    return requests


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _users(table: Table) -> UsersConfig:
    default = UsersConfig()
    users = UsersConfig(
        egress=table.matching("egress", default.egress, _ACCOUNT, "a user's name"),
        dialer=table.matching("dialer", default.dialer, _ACCOUNT, "a user's name"),
        gateway=table.matching("gateway", default.gateway, _ACCOUNT, "a user's name"),
        images=table.matching("images", default.images, _ACCOUNT, "a user's name"),
        webhook=table.matching("webhook", default.webhook, _ACCOUNT, "a user's name"),
        sinks=table.matching("sinks", default.sinks, _ACCOUNT, "a user's name"),
    )
    names = {users.egress, users.dialer, users.gateway, users.images, users.webhook, users.sinks}
    if names != names - {"root"} or len(names) != len(UsersConfig.__slots__):
        found = "egress, dialer, gateway, images, webhook and sinks must be six users other than root"
        table.findings.add(table.name, found, "rename one")
    table.end()
    return users


def _scratch(table: Table) -> ScratchConfig:
    default = ScratchConfig()
    scratch = ScratchConfig(
        reserve_bytes=_measure(table, "reserve", default.reserve_bytes, parse_size),
        preallocate=table.flag("preallocate", default=default.preallocate),
        keep_layers_seconds=_measure(table, "keep_layers", default.keep_layers_seconds, parse_duration),
    )
    table.end()
    return scratch


def _measure(table: Table, key: str, default: M, parse: Callable[[str], M]) -> M:
    """A size or a duration as people write it."""
    text = table.text(key, "")
    if not text:
        return default
    try:
        return parse(text)
    except InvalidInput as error:
        table.problem(key, error.message, error.remedy)
        return default


def _budgets(root: Table) -> tuple[LabelBudget, ...]:
    """What labels may spend: calls alone, since an agent's time is its own."""
    found: dict[tuple[str, Period], LabelBudget] = {}
    for table in root.tables("budgets", LABEL_BUDGETS_MAX):
        text = table.text("label", "")
        try:
            key, equals, value = text.partition("=")
            label(key, value)
            if not equals:
                table.problem("label", f"{shown(text)} is not of the form key=value", 'write "team=payments"')
        except InvalidInput as error:
            table.problem("label", error.message, 'write for example "team=payments"')
        period = table.one_of("period", Period.NONE)
        given = {name: table.get(name) for name in BOUNDS if name not in TIMES}
        wanted = {name: amount for name, amount in given.items() if amount is not None}
        try:
            budget = parse_budget(wanted)
        except InvalidInput as error:
            table.findings.add(table.name, error.message, error.remedy)
            budget = NO_BUDGET
        if not wanted:
            table.findings.add(table.name, "bounds nothing", "give llm_tokens, cost_usd, requests or egress_bytes")
        table.end()
        if (text, period) in found:
            table.problem("label", f"{shown(text)} has two budgets of one period", "make one of them")
        found[(text, period)] = LabelBudget(text, budget, period)
    return tuple(found.values())


def _images(table: Table) -> ImageLimits:
    default = ImageLimits()
    limits = ImageLimits(
        unpacked_bytes_max=table.whole("unpacked_bytes_max", default.unpacked_bytes_max, 1 << 20, 1 << 44),
        entries_max=table.whole("entries_max", default.entries_max, 1, 5_000_000),
        layers_max=table.whole("layers_max", default.layers_max, 1, 1000),
        compression_ratio_max=table.whole("compression_ratio_max", default.compression_ratio_max, 1, 1100),
        unpack_seconds_max=table.whole("unpack_seconds_max", default.unpack_seconds_max, 1, 86400),
    )
    table.end()
    return limits


def _size(table: Table, key: str, default: int) -> int:
    try:
        return parse_size(table.text(key, format_size(default)))
    except StockadeError as error:
        table.problem(key, error.message, error.remedy)
        return default


def _agents(table: Table) -> AgentsConfig:
    first, last = UID_FIRST, UID_LAST
    match table.get("uid_range"):
        case None:
            pass
        case [int(), int()] as bounds:
            first, last = bounds
            inside = UID_FIRST <= first <= last <= UID_LAST
            if not inside or last - first + 1 < UIDS_PER_AGENT or first % UIDS_PER_AGENT:
                table.problem(
                    "uid_range",
                    f"[{first}, {last}] is not {UIDS_PER_AGENT} or more ids within [{UID_FIRST}, {UID_LAST}]"
                    f" from a multiple of {UIDS_PER_AGENT} on",
                    "leave it out, or give each instance a part of that range",
                )
        case other:
            table.problem("uid_range", f"{shown(str(other))} is not [FIRST, LAST]", f"write [{UID_FIRST}, {UID_LAST}]")
    agents = AgentsConfig(
        on_stop=table.one_of("on_stop", OnStop.LEAVE),
        output_keep_bytes=_size(table, "output_keep", AgentsConfig().output_keep_bytes),
        output_days=table.whole("output_days", AgentsConfig().output_days, 1, 3650),
        uid_first=first,
        uid_last=last,
    )
    table.end()
    return agents
