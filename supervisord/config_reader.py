"""stockade.toml read: every key known, every value checked, every problem with its line (only load_config does I/O)."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from sandbox.images.limits import ImageLimits
from supervisord.budgets import BOUNDS, NO_BUDGET, TIMES, LabelBudget, Period, parse_budget
from supervisord.config import (
    UID_FIRST,
    UID_LAST,
    UIDS_PER_AGENT,
    AgentsConfig,
    Config,
    ControlConfig,
    GatewayKind,
    LogConfig,
    OnStop,
    RequestsConfig,
    Role,
    ScratchConfig,
    SinkConfig,
    SinkKind,
    UsersConfig,
)
from supervisord.documents import PROBLEMS_MAX, InvalidDocument, Position, Problem
from supervisord.endpoints import is_endpoint, is_loopback, read_url
from supervisord.errors import InvalidInput, StockadeError
from supervisord.gateway_reader import read_gateway
from supervisord.ids import instance_name, label, shown
from supervisord.sizes import format_size, parse_duration, parse_size
from supervisord.tables import Findings, Table

M = TypeVar("M", int, float)

CONFIG_BYTES_MAX: Final = 256 * 1024
SINKS_MAX: Final = 8
_SINK_FILES: Final = ("header_file", "ca_file", "cert_file", "key_file")
LABEL_BUDGETS_MAX: Final = 256

# sockaddr_un has 108 bytes for a path (unix(7)); the private sockets below run_dir have names of up to 45.
RUN_DIR_BYTES_MAX: Final = 60

_ACCOUNT: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_SINK_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)
_SYSLOG: Final = re.compile(
    r"unix:/[!-~]{1,100}|(udp|tcp):[A-Za-z0-9._-]{1,253}:[0-9]{1,5}|(udp|tcp):\[[0-9a-f:.]+\]:[0-9]{1,5}", re.ASCII
)
_IDENTITY: Final = re.compile(
    r"cn:[^\x00-\x1f\x7f]{1,200}|spiffe://[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255}){0,16}"
)


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
        gateway=read_gateway(root.table("gateway")),
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
        url=read_url(table, "url", ""),
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
        webhook_url=read_url(table, "webhook_url", ""), webhook_secret_file=table.path("webhook_secret_file", None)
    )
    if requests.webhook_url:
        parts = urlsplit(requests.webhook_url)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            table.problem("webhook_url", "is http: beyond this host", "use https: what agents ask would be readable")
        if requests.webhook_secret_file is None:
            table.problem("webhook_secret_file", "is missing, and webhook_url needs it", "name a file with the key")
    table.end()
    return requests


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
