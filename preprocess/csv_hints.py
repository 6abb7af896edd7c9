"""What may be wrong with a CSV file, for messages: its delimiter, a header that is not there, no text at all."""

import re
from collections.abc import Sequence

_DELIMITERS = ";\t|,"
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")
_OTHERS = {  # how files begin that are no text, and what they are
    b"\x1f\x8b": "gzip, for which its name ends in .gz",
    b"\x28\xb5\x2f\xfd": "zstd, for which its name ends in .zst",
    b"PAR1": "Parquet, for which its name ends in .parquet",
    b"ARROW1": "Arrow, for which its name ends in .arrow",
    b"BZh": "bzip2; compressed text is read from .gz and .zst",
    b"\xfd7zXZ": "xz; compressed text is read from .gz and .zst",
    b"PK\x03\x04": "a zip archive; compressed text is read from .gz and .zst",
}


def listed(names: Sequence[str]) -> str:
    """Names for a message, in quotes, since blanks around one would not be seen; and what may be wrong with one."""
    text = ", ".join(map(repr, names[:20]))[:200]
    return text if (found := other_delimiter(names)) is None else f"{text} alone; its delimiter may be {found!r}"


def other_delimiter(names: Sequence[str]) -> str | None:
    """What may stand between fields, where a header seems to have one name."""
    return next((mark for mark in _DELIMITERS if mark in names[0]), None) if len(names) == 1 else None


def are_values(names: Sequence[str]) -> bool:
    """Whether a header is rather the first row of a file without one: it has numbers."""
    return any(_NUMBER.fullmatch(name.strip()) for name in names)


def other_than_text(begins: bytes) -> str | None:
    """What a file of these first bytes, 6 at least if it has them, is instead of text."""
    return next((what for start, what in _OTHERS.items() if begins.startswith(start)), None)
