"""A working directory of its own for each test of the command line."""

import sys

import pytest

from tests.cli import commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory of the test: it holds the toy data set and the plugin of `tests.cli.commands`."""
    commands.write_toys(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("plugin", None)
