r"""A pattern as a row of pieces, each a set of characters and how often: so every prefix of a match can be told. Pure.

Streams come in pieces of any size. To say whether the end of what has come may be the beginning of a match needs an
expression for "every proper prefix", which `re` does not have. A row of pieces has one: it is derived below and never
written by hand. The row also has a longest match, so the look-back is bounded, and no nested repeats, so matching takes
time linear in the text for a given pattern.

The language is a part of regular expressions: characters, `\x` for a special one, `\d`, sets `[a-z0-9_-]`, each
followed by `{m}`, `{m,n}`, `?` or nothing. No `*`, `+`, `|`, `.`, `^`, `$` or groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATTERN_CHARS_MAX: Final = 1024
PIECES_MAX: Final = 96
MATCH_CHARS_MAX: Final = 32 * 1024
WORD: Final = "A-Za-z0-9_"
BEFORE_CHARS: Final = 6
"""How far before a match its beginning is judged by: one escape of JSON, `\\u000a`."""

_PIECE: Final = re.compile(
    r"(?P<set>\[(?:[^\]\\\[^]|\\.)(?:[^\]\\\[]|\\.)*\]|\\.|[^\\\[\](){}*+?|.^$])"
    r"(?:\{(?P<low>\d{1,5})(?:,(?P<high>\d{1,5}))?\}|(?P<maybe>\?))?",
    re.DOTALL,
)


class BadPattern(ValueError):  # noqa: N818 - named for what it says
    """A text that is no pattern of the language above; the message says where."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`chars` is one character of a regular expression: a literal, an escape or a set."""

    chars: str
    low: int
    high: int

    @property
    def whole(self) -> str:
        return self.chars if self.low == self.high == 1 else f"{self.chars}{{{self.low},{self.high}}}"

    @property
    def begun(self) -> str:
        return f"{self.chars}{{0,{self.high}}}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A named pattern. `check` says how many characters of a match count, 0 for none: a checksum that must fit."""

    name: str
    text: str
    edge: str = WORD
    """Characters that may stand neither directly before nor after a match; empty for any."""
    never_before: str = ""
    """More characters that may not stand directly before one."""
    check: Callable[[str], int] | None = None
    literal: str = field(init=False, default="")
    """Characters every match holds: where a text lacks them nothing more is tried."""
    longest: int = field(init=False, default=0)
    regex: re.Pattern[str] = field(init=False, repr=False)
    begins: re.Pattern[str] = field(init=False, repr=False)
    goes_on: re.Pattern[str] = field(init=False, repr=False)
    prefix: str = field(init=False, default="", repr=False)
    """An expression that matches from where a match may have begun to the end of the text."""

    def __post_init__(self) -> None:
        pieces = read_pieces(self.text)
        # A match with a checksum may end before the longest run does: where, its check says.
        after = f"(?![{self.edge}])" if self.edge and not self.check else ""
        begins = _begins(self.never_before + self.edge) if self.edge else ""
        # Apart from the rest: an expression that begins with characters is searched for many times faster.
        object.__setattr__(self, "regex", re.compile("".join(piece.whole for piece in pieces) + after))
        object.__setattr__(self, "begins", re.compile(begins))
        object.__setattr__(self, "goes_on", re.compile(f"[{self.edge}]" if self.edge else "(?!)"))
        object.__setattr__(self, "prefix", begins + _prefixes(pieces))
        object.__setattr__(self, "longest", sum(piece.high for piece in pieces))
        object.__setattr__(self, "literal", _literal(pieces))

    def find(self, text: str, at: int = 0) -> Iterator[tuple[int, int]]:
        """Yield start and end of each match from `at` on; those of one pattern do not overlap."""
        if self.literal not in text:
            return
        while (match := self.regex.search(text, at)) is not None:
            start = match.start()
            at = start + 1
            if self.begins.match(text, start) is None:
                continue
            end = match.end() if self.check is None else start + self.check(match.group())
            if end > start and self.goes_on.match(text, end) is None:
                yield start, end
                at = end


def read_pieces(text: str) -> tuple[Piece, ...]:
    """Read a pattern; raise BadPattern with the place that is wrong."""
    if not text or len(text) > PATTERN_CHARS_MAX:
        raise BadPattern(f"cannot read pattern: it has no or more than {PATTERN_CHARS_MAX} characters")
    pieces = []
    at = 0
    while at < len(text):
        found = _PIECE.match(text, at)
        if found is None:
            raise BadPattern(
                f"cannot read pattern at character {at + 1}: write characters, [sets], \\d and {{m,n}}; a special "
                "character after a backslash"
            )
        low = 0 if found["maybe"] else int(found["low"] or 1)
        high = 1 if found["maybe"] else int(found["high"] or found["low"] or 1)
        try:
            re.compile(found["set"])
        except re.error as error:
            raise BadPattern(f"cannot read pattern at character {at + 1}: {error.msg}") from error
        if re.fullmatch(found["set"], '"'):
            raise BadPattern("cannot read pattern: it matches a quote, and masking that would break JSON in arguments")
        if high < max(low, 1):
            raise BadPattern(f"cannot read pattern at character {at + 1}: it repeats {low} to {high} times")
        pieces.append(Piece(found["set"], low, high))
        at = found.end()
    if len(pieces) > PIECES_MAX or sum(piece.high for piece in pieces) > MATCH_CHARS_MAX:
        raise BadPattern(f"cannot read pattern: over {PIECES_MAX} pieces, or matches over {MATCH_CHARS_MAX} characters")
    if not any(piece.low for piece in pieces):
        raise BadPattern("cannot read pattern: it matches the empty text")
    return tuple(pieces)


def _begins(edge: str) -> str:
    r"""Build what must hold where a match begins.

    Arguments of tools are JSON text: after the two characters of an escape such as `\n` a word begins, and the letter
    of an escape begins none, or masking it would leave a backslash that escapes the mask.
    """
    return rf"(?!(?<=\\)[nrtbfu])(?:(?<![{edge}])|(?<=\\[nrtbf])|(?<=\\u00[01][0-9a-fA-F]))"


def _prefixes(pieces: tuple[Piece, ...]) -> str:
    """Build an expression for every non-empty prefix of a match, up to the end of the text."""
    inner = r"\Z"
    for piece in reversed(pieces):
        # Either the piece is whole and the rest follows, or the text ends within it.
        inner = rf"(?:{piece.begun}\Z|{piece.whole}{inner})"
    return rf"(?!\Z){inner}"


def _literal(pieces: tuple[Piece, ...]) -> str:
    best = run = ""
    for piece in pieces:
        plain = piece.chars[-1] if len(piece.chars) == 1 or re.fullmatch(r"\\[^\w\s]", piece.chars) else ""
        run = run + plain if plain and piece.low == piece.high == 1 else ""
        best = max(best, run, key=len)
    return best
