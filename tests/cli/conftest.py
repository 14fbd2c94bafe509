"""The command line, called as a user's shell calls it but inside of this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from asynctrain.cli import main


@dataclass(frozen=True)
class Called:
    """What a call of the command line came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        (line,) = self.stdout.splitlines()
        return json.loads(line)

    @property
    def sentence(self) -> str:
        """The one line on standard error."""
        (line,) = self.stderr.splitlines()
        return line


AsynctrainCommand = Callable[..., Called]


@pytest.fixture
def asynctrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AsynctrainCommand:
    """Return a function that calls ``asynctrain`` with its arguments."""

    def call(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["asynctrain", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())
        printed = capsys.readouterr()
        return Called(int(ended.value.code or 0), printed.out, printed.err)

    return call
