"""A digest of a source file that says whether its code is the same: comments, docstrings and empty lines of
Python do not count, so that a corrected sentence does not put every decision into another environment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import tokenize
from pathlib import Path

__all__ = ["code_of", "file_digest"]

BETWEEN = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
SILENT = {tokenize.COMMENT, tokenize.NL}


@functools.cache
def file_digest(path: str) -> str:
    """16 hexadecimal digits for a file's code; "unreadable" for one that cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return "unreadable"
    if path.endswith(".py"):
        with contextlib.suppress(UnicodeDecodeError, tokenize.TokenError, SyntaxError):  # else as it is
            content = code_of(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def code_of(text: str) -> str:
    """Python source without comments, strings that are statements (docstrings), and empty lines.

    What is left keeps its spelling and indentation: the same in every Python version, as syntax trees are not.
    Raises tokenize.TokenError or SyntaxError for what is not Python.
    """
    lines = text.splitlines()
    kept = [list(line) for line in lines]

    def blank(start: tuple[int, int], end: tuple[int, int]) -> None:
        for row in range(start[0], end[0] + 1):
            line = kept[row - 1]
            first = start[1] if row == start[0] else 0
            last = end[1] if row == end[0] else len(line)
            line[first:last] = " " * (last - first)

    before: int | None = None  # type of the last token that counts
    waiting: tokenize.TokenInfo | None = None  # a string that may be a whole statement
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            blank(token.start, token.end)
        if token.type in SILENT:
            continue
        if waiting is not None and token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            blank(waiting.start, waiting.end)
        begins = before is None or before in BETWEEN
        waiting = token if token.type == tokenize.STRING and begins else None
        before = token.type
    return "\n".join(line for chars in kept if (line := "".join(chars).rstrip()))
