"""Text of models and data cannot steer a terminal, nor be read as markup."""

import io

from rich.console import Console

from lit_align.cli.main import main
from lit_align.evaluation.tables import comparison_table, completions_table
from lit_align.terminal import strip_control_characters

EVIL = "a\x1b[2J\x1b]0;title\x07b\r\x9bc\u202ed[red]e[/]"
PLAIN = "a[2J]0;titlebcd[red]e[/]"


def printed(table: object) -> str:
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, width=200, color_system=None).print(table)
    return screen.getvalue()


def test_escapes_bells_and_turns_are_left_out_and_lines_stay():
    assert strip_control_characters(EVIL) == PLAIN
    assert strip_control_characters("é\n\t\u65e5\U0001f600") == "é\n\t\u65e5\U0001f600"


def test_no_table_passes_them_on():
    row = {"prompt": EVIL, "completion": EVIL, "score": 0.5, "kl": 1.0}
    talk = {**row, "prompt": [{"role": "user", "content": EVIL}]}
    for shown in (
        printed(completions_table([row, talk], [row, talk])),
        printed(comparison_table([EVIL, "x"], {EVIL: ["1", "2"]})),
    ):
        assert PLAIN in shown
        assert not set(shown) & set("\x1b\x07\r\x9b\u202e")


def test_no_error_passes_them_on(tmp_path, capsys):
    (tmp_path / "run\x1b[2J").mkdir()
    assert main(["report", str(tmp_path / "run\x1b[2J")]) == 2
    said = capsys.readouterr().err
    assert "run[2J: no metrics.csv" in said
    assert "\x1b" not in said
