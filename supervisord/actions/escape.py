"""Strings that an agent chose, made safe to show to a person: nothing in them drives a terminal or lies (pure)."""

import unicodedata
from typing import Final

CHARACTERS_MAX: Final = 4096
_SURROGATE_ESCAPE_FIRST: Final = 0xDC80
_SURROGATE_ESCAPE_LAST: Final = 0xDCFF
_BYTE: Final = 0x100
_BASIC_PLANE: Final = 0x10000
# Categories that are invisible, reorder text (bidirectional controls are Cf: CVE-2021-42574), break lines,
# or mean something to one font only: control, format, surrogate, private, unassigned, line and paragraph separator.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def shown(text: str, characters_max: int = CHARACTERS_MAX) -> str:
    r"""The text on one line, with control, invisible and reordering characters written as `\xNN` or `\uNNNN`.

    Backslashes are doubled, so that what is shown stands for one text only. Longer texts end in an ellipsis.
    """
    if len(text) <= characters_max and text.isascii() and text.isprintable() and "\\" not in text:
        return text
    parts: list[str] = []
    length = 0
    for character in text:
        part = _escaped(character)
        length += len(part)
        if length > characters_max:
            return "".join(parts) + "…"
        parts.append(part)
    return "".join(parts)


def _escaped(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    # Spaces other than U+0020 look like it: a second column could be forged with them.
    plain = character == " " or not character.isspace()
    if plain and unicodedata.category(character) not in _UNSAFE and not unicodedata.combining(character):
        return character
    if _SURROGATE_ESCAPE_FIRST <= code <= _SURROGATE_ESCAPE_LAST:
        return f"\\x{code - _SURROGATE_ESCAPE_FIRST + 0x80:02x}"  # a byte that was not UTF-8
    if code < _BYTE:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < _BASIC_PLANE else f"\\U{code:08x}"
