"""Printing what may hold names of files."""

from __future__ import annotations

import click

# A terminal would obey them: control characters but for tab and new line, and what turns the
# direction of text.
_OBEYED = (*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x200F)
_OBEYED += (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _OBEYED}


def readable(text: str) -> str:
    """The text with what a terminal would obey written out."""
    return text.translate(_SHOWN)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line."""
    click.echo(readable(text), err=err)
