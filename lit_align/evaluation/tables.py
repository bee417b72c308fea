"""Statistics and completions as tables on a terminal."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from lit_align.evaluation.statistics import ResponseRows
from lit_align.runs.run_folder import conversation_text
from lit_align.terminal import strip_control_characters


def completions_table(before: ResponseRows, after: ResponseRows, max_rows: int = 6) -> Table:
    """Return a table with the first completions of two models side by side.

    Args:
        before: Rows of the first model.
        after: Rows of the second model for the same prompts.
        max_rows: Number of prompts that are shown.
    """
    table = Table(title="Held-out prompts, before and after", show_lines=True)
    for name in ("prompt", "before", "reward", "after", "reward", "KL"):
        table.add_column(name, justify="right" if name in ("reward", "KL") else "left")
    for old, new in list(zip(before, after, strict=True))[:max_rows]:
        prompt, earlier, later = (
            escape(strip_control_characters(conversation_text(each)))
            for each in (old["prompt"], old["completion"], new["completion"])
        )
        table.add_row(prompt, earlier, f"{old['score']:.2f}",
                      later, f"{new['score']:.2f}", f"{new['kl']:.1f}")  # fmt: skip
    return table


def statistics_table(statistics: Mapping[str, float], title: str) -> Table:
    """Return a table with one statistic per line."""
    table = Table(title=title)
    for name in ("figure", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, value in statistics.items():
        table.add_row(name, f"{value:.4g}")
    return table


def comparison_table(names: Sequence[str], statistics: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a column per model and a line per statistic.

    Args:
        names: Names of the models.
        statistics: Formatted value of each model, by the statistic's name.
    """
    table = Table(title="Responses to the same prompts")
    table.add_column("figure")
    for name in names:
        # a hub id or a reward's name is a user's text: it must not be parsed as markup
        table.add_column(escape(strip_control_characters(name)), justify="right", overflow="fold")
    for name, values in statistics.items():
        table.add_row(escape(strip_control_characters(name)), *values)
    return table
