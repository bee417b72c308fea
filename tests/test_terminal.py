"""Text of models and data cannot control a terminal, and is not read as markup."""

import io

from rich.console import Console

from lit_align.cli.main import main
from lit_align.evaluation.tables import comparison_table, completions_table
from lit_align.terminal import strip_control_characters

UNSAFE = "a\x1b[2J\x1b]0;title\x07b\r\x9bc\u202ed[red]e[/]"
SAFE = "a[2J]0;titlebcd[red]e[/]"


def render(table: object) -> str:
    output = io.StringIO()
    Console(file=output, force_terminal=True, width=200, color_system=None).print(table)
    return output.getvalue()


def test_control_characters_are_removed_and_line_breaks_are_kept():
    assert strip_control_characters(UNSAFE) == SAFE
    assert strip_control_characters("é\n\t\u65e5\U0001f600") == "é\n\t\u65e5\U0001f600"


def test_tables_print_no_control_characters():
    row = {"prompt": UNSAFE, "completion": UNSAFE, "score": 0.5, "kl": 1.0}
    conversation = {**row, "prompt": [{"role": "user", "content": UNSAFE}]}
    for shown in (
        render(completions_table([row, conversation], [row, conversation])),
        render(comparison_table([UNSAFE, "x"], {UNSAFE: ["1", "2"]})),
    ):
        assert SAFE in shown
        assert not set(shown) & set("\x1b\x07\r\x9b\u202e")


def test_error_messages_print_no_control_characters(tmp_path, capsys):
    (tmp_path / "run\x1b[2J").mkdir()
    assert main(["report", str(tmp_path / "run\x1b[2J")]) == 2
    message = capsys.readouterr().err
    assert "run[2J: no metrics.csv" in message
    assert "\x1b" not in message
