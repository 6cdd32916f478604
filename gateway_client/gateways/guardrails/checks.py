"""Whether digits that look like a number are one: checksums, each with its source. Pure.

Each takes the text of a match and gives how many of its characters are the number, 0 for none.
"""

from __future__ import annotations

import re
from itertools import cycle
from typing import Final

PHONE_DIGITS_MIN: Final = 8
PHONE_DIGITS_MAX: Final = 15  # ITU-T E.164 §6

# SWIFT, IBAN registry (ISO 13616): length by country.
_IBAN_CHARS: Final = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip

# Issuer ranges of ISO/IEC 7812: without them every tenth number of sixteen digits would pass.
_CARD: Final = re.compile(
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14}"
)


def digits(text: str) -> str:
    return "".join(char for char in text if "0" <= char <= "9")


def luhn(text: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for weight, char in zip(cycle((1, 2)), reversed(text), strict=False):
        product = weight * int(char)
        total += product // 10 + product % 10
    return total % 10 == 0


def card(text: str) -> int:
    number = digits(text)
    return len(text) if _CARD.fullmatch(number) and luhn(number) else 0


def iban(text: str) -> int:
    """ISO 13616-1 and ISO 7064 MOD 97-10; the length of the country, with or without spaces."""
    wanted = _IBAN_CHARS.get(text[:2], 0)
    plain = ""
    for at, char in enumerate(text):
        if char != " ":
            plain += char
        if wanted and len(plain) == wanted:
            number = "".join(str(int(each, 36)) for each in plain[4:] + plain[:4])
            return at + 1 if int(number) % 97 == 1 else 0
    return 0


def phone(text: str) -> int:
    return len(text) if PHONE_DIGITS_MIN <= len(digits(text)) <= PHONE_DIGITS_MAX else 0


def cut_pem(text: str) -> int:
    """The whole, but for a backslash at its end that belongs to what follows: in JSON text it may escape a quote."""
    return len(text) - (len(text) - len(text.rstrip("\\"))) % 2


def us_ssn(text: str) -> int:
    """Numbers that were never given out (20 CFR 422.103; SSA, randomization of 2011) are none."""
    area, group, serial = text.split("-")
    return len(text) if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000" else 0


def es_dni(text: str) -> int:
    """Real Decreto 1553/2005: the letter is the number modulo 23."""
    number = text[:-1].translate(str.maketrans("XYZ", "012"))
    return len(text) if "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1] else 0


def fr_nir(text: str) -> int:
    """INSEE: the key is 97 less the number modulo 97; Corsica's 2A and 2B count as 19 and 18."""
    plain = text.replace(" ", "").replace("2A", "19").replace("2B", "18")
    return len(text) if plain.isdigit() and 97 - int(plain[:13]) % 97 == int(plain[13:]) else 0


_ODD: Final = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
    22, 25, 24, 23), strict=True))  # fmt: skip


def it_cf(text: str) -> int:
    """Decreto ministeriale 23 December 1976: the last letter is a weighted sum modulo 26."""
    odd = sum(_ODD[char] for char in text[0:15:2])
    even = sum(int(char) if char.isdigit() else ord(char) - ord("A") for char in text[1:15:2])
    return len(text) if chr(ord("A") + (odd + even) % 26) == text[15] else 0


def br_cpf(text: str) -> int:
    """Receita Federal: two digits, each a weighted sum modulo 11; eleven equal digits are none."""
    number = [int(char) for char in digits(text)]
    if len(set(number)) == 1:
        return 0
    for size in (9, 10):
        rest = sum(weight * digit for weight, digit in zip(range(size + 1, 1, -1), number, strict=False)) * 10 % 11 % 10
        if rest != number[size]:
            return 0
    return len(text)
