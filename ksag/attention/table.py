"""Rows of cells, the first one the heading, as a table: in text for a terminal, in HTML for a notebook."""

import html
from collections.abc import Callable, Sequence

Rows = Sequence[Sequence[str]]


def as_text(rows: Rows, align: Callable[[str, int], str] = str.ljust) -> str:
    """
    >>> print(as_text([["path", "heads"], ["mid", "8"]]))
    path  heads
    mid   8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(align, row, widths)).rstrip() for row in rows)


def as_html(rows: Rows) -> str:
    """
    >>> as_html([["path"], ["<lambda>"]])
    '<table><thead><tr><th>path</th></tr></thead><tbody><tr><td>&lt;lambda&gt;</td></tr></tbody></table>'
    """
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body)
    return f"<table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead><tbody>{lines}</tbody></table>"
