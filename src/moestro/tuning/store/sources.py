"""A digest of the code that decides how fast a runner is: of what runs on the device, not of what launches it.

A runner says which files those are (`kernel_sources`); one that does not is measured by the file of its class. Of
Python, each function, class and constant at the top of a file counts by itself: imports, comments, docstrings,
empty lines, the file's name and the order do not, so that moving a kernel or correcting a sentence puts no decision
into another environment. Of CUDA C++ (.cu, .cuh) comments and empty lines do not count; other files count byte by byte.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moestro.tuning.forks import Lock
from moestro.tuning.spec.plain_json import digest

__all__ = ["code_of", "file_digests", "source_digest"]

BETWEEN = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
SILENT = {tokenize.COMMENT, tokenize.NL}
# CPython 3.11 counts the depth of a tree for all threads together, and ends with SystemError where two parse at once
PARSING = Lock()
COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.S)  # or a string, which may look like one


def source_digest(runners: Sequence[Any]) -> str:
    """A digest of the code that these runners' speed depends on; runners may be given as their classes."""
    paths: set[str] = set()
    for runner in runners:
        hook = getattr(runner, "kernel_sources", None)
        if callable(hook):
            paths |= {str(path) for path in hook()}
        else:
            own = _class_source(runner if isinstance(runner, type) else type(runner))
            paths |= {own} if own else set()
    return digest(sorted({part for path in paths for part in file_digests(path)}))


@functools.cache
def _class_source(cls: Any) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except (TypeError, OSError):
        return None


@functools.cache
def file_digests(path: str) -> frozenset[str]:
    """16 hexadecimal digits for each piece of a file's code; "unreadable" for one that cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return frozenset({"unreadable"})
    pieces = [content]
    if path.endswith(".py"):
        with contextlib.suppress(UnicodeDecodeError, tokenize.TokenError, SyntaxError):  # else as it is
            pieces = [piece.encode() for piece in _pieces(content.decode())]
    elif path.endswith((".cu", ".cuh")):
        pieces = [cuda_code_of(content.decode(errors="replace")).encode()]
    return frozenset(hashlib.sha256(piece).hexdigest()[:16] for piece in pieces)


def _pieces(text: str) -> Iterator[str]:
    """The code of each top-level statement of Python source, but imports, docstrings and `__all__`."""
    lines = text.splitlines()
    with PARSING:
        body = ast.parse(text).body
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            continue
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        yield code_of("\n".join(lines[first - 1 : node.end_lineno]))


def cuda_code_of(text: str) -> str:
    """CUDA C++ without comments and empty lines."""
    plain = COMMENT.sub(lambda found: found[0] if found[0].startswith('"') else " ", text)
    return "\n".join(line.rstrip() for line in plain.splitlines() if line.strip())


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
