"""URLs and addresses as configuration has them: read, and told apart (pure)."""

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

from supervisord.ids import shown
from supervisord.tables import Table

PORT_MAX: Final = 65535


def read_url(table: Table, key: str, default: str) -> str:
    """Gives the http(s) URL of a key; what is none is a problem of the table."""
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


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
