"""Which agents were launched with given labels, by what the log says: those of long ago too.

An entry names its agent, and its launch says the labels. Launches are read once for each set of labels that is asked
for; what was found is kept for the next page of the same question.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import Action

LAUNCH: Final = "agent.launch"
QUESTIONS_KEPT_MAX: Final = 16
PAGE: Final = 1000

_Labels = frozenset[tuple[str, str]]


def launched_with(action: Action, labels: _Labels) -> bool:
    """Whether this entry is a launch with all of these labels, maybe others too."""
    given = action.details.get("labels")
    return action.verb == LAUNCH and isinstance(given, dict) and all(given.get(key) == value for key, value in labels)


class Labelled:
    """Answers which agents have labels; one for each log."""

    def __init__(self, log: ActionLog) -> None:
        self._log = log
        self._found: OrderedDict[_Labels, tuple[int, set[str]]] = OrderedDict()

    async def agents(self, labels: Mapping[str, str]) -> set[str]:
        """Their ids, as of now."""
        wanted = frozenset(labels.items())
        seen, ids = self._found.pop(wanted, (0, set()))
        while True:
            launches = await self._log.query(verb=LAUNCH, after_seq=seen, limit=PAGE)
            for entry in launches:
                seen = entry.seq
                if launched_with(entry.action, wanted):
                    ids.add(entry.action.agent_id)
            if len(launches) < PAGE:
                break
        self._found[wanted] = seen, ids
        while len(self._found) > QUESTIONS_KEPT_MAX:
            self._found.popitem(last=False)
        return set(ids)
