"""What every subcommand of llmloss shares."""

from __future__ import annotations

import pytest

from llmloss_ext.cli.main import main


@pytest.mark.parametrize("argv", [["verify", "--dtype", "x"], ["nothing"], []])
def test_wrong_options_end_in_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error:")
    assert error.count("\n") == 1
