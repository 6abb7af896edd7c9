"""What may be wrong with a CSV file, for messages: its delimiter, a header that is not there, no text at all."""

import re
from collections.abc import Sequence

_DELIMITERS = ";\t|,"
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")
NO_HEADER = "; it looks like a row: without a header, the spec of a table names the columns in metadata.csv.columns"
BEGINNING = 10  # bytes of a file that tell what it is
_OTHERS = {  # how files begin that are no text, more than a header can (a column may be called PAR1), and what they are
    rb"\x1f\x8b": "gzip, for which its name ends in .gz",
    rb"\x28\xb5\x2f\xfd": "zstd, for which its name ends in .zst",
    rb"PAR1[\x00-\x08\x0e-\x1f]": "Parquet, for which its name ends in .parquet",
    rb"ARROW1\x00": "Arrow, for which its name ends in .arrow",
    rb"BZh[1-9]1AY&SY": "bzip2; compressed text is read from .gz and .zst",
    rb"\xfd7zXZ": "xz; compressed text is read from .gz and .zst",
    rb"PK\x03\x04": "a zip archive; compressed text is read from .gz and .zst",
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
    """What a file of these first bytes, BEGINNING of them if it has as many, is instead of text."""
    return next((what for start, what in _OTHERS.items() if re.match(start, begins)), None)
