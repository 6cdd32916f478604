"""What an agent is told about itself, a frame at a time (pure).

A list of grants has no bound that fits a frame to its worker, so `scopes` comes in pages: `next` names the grant to go
on after, as in `GET /.stockade/v1/scopes?after=GRANT_ID`.
"""

import json
from typing import Any, Final
from urllib.parse import parse_qs

from gateway_client.egress.decide import Reply

REPLY_BYTES_MAX: Final = 48 * 1024
_FIELDS_MAX: Final = 8


def fitting(reply: Reply, query: str) -> Reply:
    """The reply, or the page of its list of scopes that the query asks for and a frame holds."""
    listed = reply.body.get("scopes") if isinstance(reply.body, dict) else None
    if not isinstance(listed, list):
        return reply
    try:
        after = parse_qs(query, max_num_fields=_FIELDS_MAX).get("after", [""])[0]
    except ValueError:
        after = ""
    ids = [each["grant_id"] for each in listed]
    start = ids.index(after) + 1 if after in ids else 0
    page, size = _page(listed[start:])
    body: dict[str, Any] = {**reply.body, "scopes": page}
    if start + size < len(listed):
        body["next"] = ids[start + size - 1]
    return Reply(reply.status, body)


def _page(items: list[Any]) -> tuple[list[Any], int]:
    """As many as fit, and at least one."""
    used = 0
    for count, item in enumerate(items):
        used += len(json.dumps(item, ensure_ascii=True)) + 1
        if used > REPLY_BYTES_MAX and count:
            return items[:count], count
    return items, len(items)
