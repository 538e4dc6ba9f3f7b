"""`wavelet-lm serve` as it is typed: mistakes are one line."""

import sys

import pytest

from wavelet_lm.cli import serve
from wavelet_lm.errors import UserError


@pytest.mark.parametrize("port", ["-1", "65536", "http", "80.0", ""])
def test_a_port_that_there_is_not(monkeypatch, port):
    monkeypatch.setattr(sys, "argv", ["serve", "logs/run", f"--port={port}"])
    with pytest.raises(UserError, match=f"--port: '{port}' is not between 0 and 65535"):
        serve.main()
