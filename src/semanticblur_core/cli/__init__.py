"""The command line ``semanticblur-core``.

Each command lives in a module of its own that is imported only when the command is called, so that
help and completion answer at once. Exit codes: 0 done, 1 a quality gate failed, 2 bad usage or
unreadable input, 130 interrupted, 141 nobody reads the output any more (``| head``).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from semanticblur_core import __version__
from semanticblur_core.cli._echo import echo
from semanticblur_core.errors import SemanticBlurError, quieten_readers

_COMMANDS = {
    "detect": "Find what is out of focus in images.",
    "focus": "Say what is in focus: gates, reports, stacks.",
    "eval": "Score blur maps or a model against masks.",
    "data": "Look through data sets of images and masks.",
    "models": "List, describe and verify weights.",
    "train": "Train a network on images and masks.",
    "finetune": "Teach a model with a few labelled images.",
    "ablate": "Train the variants of the paper's tables.",
    "export": "Write a model as ONNX or for bioimage.io.",
    "bench": "Measure speed on this machine.",
}


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """What click would exit with is 1, which says that a gate failed."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class _LazyGroup(click.Group):
    """A group that imports ``cli.<command>`` when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"semanticblur_core.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def make_context(self, *arguments: Any, **how: Any) -> click.Context:
        with _reader_may_leave():  # of --help and --version
            return super().make_context(*arguments, **how)

    def invoke(self, ctx: click.Context) -> object:
        with _reader_may_leave():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="semanticblur-core")
def cli() -> None:
    """Tell what is in focus in an image.

    `semanticblur-core COMMAND -h` explains each command.
    """


class _Echo(logging.Handler):
    """What the library tells of long work, on the error stream."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(f"semanticblur-core: {record.getMessage()}", err=True)


def _is_torch_out_of_memory(error: Exception) -> bool:
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:
        return False
    from semanticblur_core.device import is_out_of_memory

    return is_out_of_memory(error)


def main() -> None:
    """Entry point of the console script: errors meant for people become one line, exit code 2."""
    try:
        # Text that a terminal cannot show must not end a long run.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    except AttributeError:
        pass
    quieten_readers()
    ours = logging.getLogger("semanticblur_core")
    ours.setLevel(logging.INFO)
    ours.handlers = [_Echo()]
    try:
        sys.exit(cli.main(prog_name="semanticblur-core", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        echo("semanticblur-core: stopped", err=True)
        sys.exit(130)
    except SemanticBlurError as error:
        echo(f"semanticblur-core: {error}", err=True)
        sys.exit(2)
    except MemoryError:
        echo("semanticblur-core: out of memory; a smaller size takes less", err=True)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        echo(f"semanticblur-core: {where}{error.strerror or error}", err=True)
        sys.exit(2)
    except Exception as error:  # of a kind nobody foresaw; 1 would say that a gate failed
        if _is_torch_out_of_memory(error):
            echo("semanticblur-core: out of memory; a smaller size takes less", err=True)
            sys.exit(2)
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        echo(f"semanticblur-core: unexpected {reason}", err=True)
        sys.exit(2)
