"""How many bytes may still pass on a grant: one count for everything that an agent has open on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Allowance:
    """Counted where the bytes pass, before they do: what would be one too many does not."""

    left_bytes: int
    spent: bool = False

    def take(self, count: int) -> bool:
        """Take that many off; False, from then on for ever, where they are not left."""
        if self.spent or count > self.left_bytes:
            self.spent = True
            return False
        self.left_bytes -= count
        return True
