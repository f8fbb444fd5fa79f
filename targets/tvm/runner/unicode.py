"""What the runner's tokenizer knows of Unicode, as ranges of code points."""

import sys
import unicodedata
from collections.abc import Collection, Iterator
from itertools import chain, groupby

# vowels and final consonants that join the syllable before them
HANGUL = (range(0x1161, 0x1176), range(0x11A8, 0x11C3))


def category(first: str) -> list[int]:
    """Code points whose general category begins with a letter such as `L`."""
    return [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith(first)]


def marks() -> list[int]:
    """Code points that normal forms may reorder: their combining class is not 0."""
    return [c for c in range(sys.maxunicode + 1) if unicodedata.combining(chr(c))]


def uncomposed() -> list[int]:
    """Code points that normal form C changes, alone (Unicode's NFC_QC=No) or behind another one (Maybe)."""
    return sorted({*chain(*HANGUL), *_uncomposed()})


def _uncomposed() -> Iterator[int]:
    for c in range(sys.maxunicode + 1):
        char = chr(c)
        if unicodedata.normalize("NFC", char) != char:
            yield c
        parts = unicodedata.decomposition(char).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            pair = "".join(chr(int(part, 16)) for part in parts)
            if unicodedata.normalize("NFC", pair) == char:
                yield ord(pair[1])


def ranges_of(points: Collection[int]) -> list[tuple[int, int]]:
    """First and last of each run of ascending code points."""
    runs = groupby(enumerate(points), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]


def tables() -> str:
    """What pieces.cc includes as unicode.inc."""
    found = {
        "kLetters": category("L"), "kNumbers": category("N"), "kMarks": marks(), "kUncomposed": uncomposed(),
    }  # fmt: skip
    return "".join(_table(name, points) for name, points in found.items())


def _table(name: str, points: Collection[int]) -> str:
    rows = ", ".join(f"{{{first}, {last}}}" for first, last in ranges_of(points))
    return f"constexpr Range {name}[] = {{{rows}}};\n"
