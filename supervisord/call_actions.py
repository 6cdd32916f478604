"""What the watcher says of an agent's processes, as entries of the action log (pure).

The watcher bounds how much it says and how often, and writes the agent's words as printable text (sandbox/notices.py).
It reads hostile memory, so that what it says is bounded here again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from supervisord.actions.types import Action

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisord.actions.types import JSON

ARGUMENTS_MAX: Final = 16
ARGUMENT_CHARACTERS_MAX: Final = 256
PATH_CHARACTERS_MAX: Final = 1024
DIGEST_CHARACTERS: Final = 71
NUMBER_MAX: Final = 2**53


def called_action(agent_id: str, stream_id: str, event: object, call_name: Callable[[int], str]) -> Action | None:
    """The entry for one thing that was told; None for a kind that this release does not know.

    `by` says who started the tree of processes: the agent's own program, or somebody with `exec`, and in which stream.
    """
    if not isinstance(event, dict):
        return None
    actor = f"agent:{agent_id}"
    by: dict[str, JSON] = {"by": "agent" if stream_id == agent_id else "exec"}
    if stream_id != agent_id:
        by["stream_id"] = stream_id
    match event.get("kind"):
        case "exec":
            args = event.get("args")
            details: dict[str, JSON] = {
                **by,
                "pid": _whole(event.get("pid")),
                "ppid": _whole(event.get("ppid")),
                "argc": _whole(event.get("argc")),
                "argv_digest": str(event.get("digest", ""))[:DIGEST_CHARACTERS],
                "args": [str(a)[:ARGUMENT_CHARACTERS_MAX] for a in (args if isinstance(args, list) else [])][
                    :ARGUMENTS_MAX
                ],
            }
            path = str(event.get("path", ""))[:PATH_CHARACTERS_MAX]
            reason = "" if path else "its memory could not be read"
            return Action(agent_id, actor, "process.exec", path, "allowed", reason, details)
        case "execs":
            reason = "too many to be told one by one"
            return Action(agent_id, actor, "process.exec", "", "allowed", reason, {**by, **_times(event)})
        case "refused":
            number = _whole(event.get("call"))
            name = call_name(number) if number >= 0 else "many calls"
            return Action(agent_id, actor, "process.refused", name, "denied", "", {**by, **_times(event)})
        case "interrupted":
            reason = "the watcher was replaced: what it had not told yet is lost"
            if event.get("unread"):
                reason += "; it ended at a call of this agent, of which execs are only counted from now on"
            return Action(agent_id, "daemon", "process.watch", "", "failed", reason, {})
    return None


def _times(event: dict[str, object]) -> dict[str, JSON]:
    return {"times": _whole(event.get("times"))}


def _whole(value: object) -> int:
    return value if isinstance(value, int) and abs(value) <= NUMBER_MAX else -1
