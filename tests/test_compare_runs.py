"""The comparison of two folders of runs, on tables written by hand."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare_runs.py"))
RENAMED = {"rollout": "iteration", "objective/kl": "kl/per_response", "objective/entropy": None}
TABLE = "loss,step\n0.5,0\n0.25,1\n"


def write_runs(folder: Path, **tables: str) -> Path:
    """Write a metrics.csv for each run and return the folder."""
    folder.mkdir()
    for name, text in tables.items():
        (folder / name).mkdir()
        (folder / name / "metrics.csv").write_text(text)
    return folder


@pytest.fixture
def compare(tmp_path, capsys):
    """Compare two tables of a run `ppo`; returns the exit status and the run's line."""

    def compared(before: str, after: str) -> tuple[int, str]:
        folders = (write_runs(tmp_path / "before", ppo=before),
                   write_runs(tmp_path / "after", ppo=after))  # fmt: skip
        status = SCRIPT["compare_folders"](*folders, RENAMED)
        return status, capsys.readouterr().out.splitlines()[0]

    return compared


def test_equal_tables(compare):
    assert compare(TABLE, TABLE) == (0, "ppo: equal (2 rows, 2 columns)")


def test_order_of_columns_does_not_matter(compare):
    assert compare(TABLE, "step,loss\n0,0.5\n1,0.25\n")[0] == 0


def test_renamed_column_is_compared_under_its_new_name(compare):
    before, after = "rollout,step\n1.0,0\n", "iteration,step\n{},0\n"
    assert compare(before, after.format("1.0"))[0] == 0


def test_renamed_column_with_another_value_differs(compare):
    line = "ppo: iteration in row 1 was '1.0', is '2.0'"
    assert compare("rollout\n1.0\n", "iteration\n2.0\n") == (1, line)


def test_new_name_of_a_validation_metric_keeps_the_prefix():
    new_name = SCRIPT["new_name"]
    assert new_name("val/objective/kl", RENAMED) == "val/kl/per_response"
    assert new_name("val/ratio", {"val/ratio": "policy/ratio_mean"}) == "policy/ratio_mean"
    assert new_name("val/objective/entropy", RENAMED) is None


def test_dropped_column_is_not_missing(compare):
    assert compare("objective/entropy,step\n40.5,0\n", "step\n0\n")[0] == 0


def test_first_differing_digit_is_reported(compare):
    line = "ppo: loss in row 2 was '0.25', is '0.250'"
    assert compare(TABLE, "loss,step\n0.5,0\n0.250,1\n") == (1, line)


def test_missing_and_extra_columns_are_reported(compare):
    line = "ppo: missing columns: kl, reward; extra columns: score"
    assert compare("step,reward,kl\n0,1,2\n", "step,score\n0,1\n") == (1, line)


def test_different_number_of_rows_is_reported(compare):
    assert compare(TABLE, "loss,step\n0.5,0\n") == (1, "ppo: number of rows was 2, is 1")


def test_time_and_memory_are_ignored(compare):
    before = "loss,memory/peak,time/update,tokens_per_second\n0.5,10,0.1,300\n"
    after = "loss,time/update,tokens_per_second\n0.5,0.2,299\n"
    assert compare(before, after) == (0, "ppo: equal (1 rows, 1 columns)")


@pytest.mark.parametrize("table", ["", "loss,step\n", "time/update\n0.1\n"])
def test_tables_without_a_cell_to_compare_fail(compare, table):
    assert compare(table, table) == (1, "ppo: no cell to compare")


def test_two_columns_of_one_new_name_are_refused(compare):
    with pytest.raises(ValueError, match="rollout and iteration would both become iteration"):
        compare("iteration,rollout\n1,1\n", "iteration\n1\n")


def test_runs_of_one_folder_only_are_missing_in_the_other(tmp_path, capsys):
    before = write_runs(tmp_path / "before", dpo=TABLE, ppo=TABLE)
    after = write_runs(tmp_path / "after", dpo=TABLE, sft=TABLE)
    assert SCRIPT["main"]([str(before), str(after)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "dpo: equal (2 rows, 2 columns)",
        f"ppo: missing in {after}",
        f"sft: missing in {before}",
        "1 runs compared, 2 runs differ or are missing",
    ]


def test_runs_in_nested_folders_are_found(tmp_path):
    before, after = (write_runs(tmp_path / name) for name in ("before", "after"))
    for folder in (before, after):
        write_runs(folder / "two_ranks", ppo=TABLE)
    assert SCRIPT["main"]([str(before), str(after)]) == 0


def test_nothing_compared_fails(tmp_path, capsys):
    before, after = (write_runs(tmp_path / name) for name in ("before", "after"))
    assert SCRIPT["main"]([str(before), str(after)]) == 1
    assert capsys.readouterr().out == "0 runs compared, 0 runs differ or are missing\n"
