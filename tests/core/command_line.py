"""The command line, called in the tests' own process: loading torch anew takes seconds."""

import io
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from semanticblur_core.cli import main


@dataclass(frozen=True)
class Done:
    """What a process would leave behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, cwd: Path | None = None, home: Path | None = None) -> Done:
    """``semanticblur-core ARGUMENTS``, in a folder and with a cache of one's own."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["semanticblur-core", *arguments])
        # These two would hold for all tests that come after.
        patch.setattr("semanticblur_core.device.keep_freed_memory", lambda: None)
        for library in ("tifffile", "PIL"):
            patch.setattr(logging.getLogger(library), "setLevel", lambda level: None)
        if cwd is not None:
            patch.chdir(cwd)
        if home is not None:
            patch.setenv("SEMANTICBLUR_HOME", str(home))
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    code = end.value.code
    assert code is None or isinstance(code, int)
    return Done(code or 0, out.getvalue(), err.getvalue())
