"""Readers of files, folders, the hub and the toy grammar."""

import json
import pathlib

import pytest

from lit_align.data.sources import load_rows
from lit_align.errors import UserError

ROWS = [{"prompt": "a", "level": 1}, {"prompt": "b\u2028c", "level": 2}]


def write(folder: pathlib.Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_json_and_json_lines_files(tmp_path):
    assert load_rows(write(tmp_path, "a.json", json.dumps(ROWS))) == ROWS
    assert load_rows(write(tmp_path, "a.jsonl", lines(ROWS) + "\n")) == ROWS
    assert load_rows(write(tmp_path, "b.json", lines(ROWS))) == ROWS
    assert load_rows(write(tmp_path, "a.jsonl", lines(ROWS)), max_rows=1) == ROWS[:1]


def test_csv_file(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,answer\n"two\nlines",4\nb,5\n')
    assert load_rows(path) == [
        {"prompt": "two\nlines", "answer": "4"},
        {"prompt": "b", "answer": "5"},
    ]


def test_tables_without_header_line(tmp_path):
    rows = [{"id": "1", "text": 'a "film'}, {"id": "2", "text": "b, c"}]
    tabs = '1\ta "film\n2\tb, c\n'
    for name in ("a.tsv", "a.txt"):
        assert load_rows(write(tmp_path, name, tabs), column_names=["id", "text"]) == rows
    assert load_rows(write(tmp_path, "b.tsv", "id\ttext\n" + tabs)) == rows
    commas = write(tmp_path, "a.csv", '1,"a ""film"\n2,"b, c"\n')
    assert load_rows(commas, column_names=["id", "text"]) == rows
    with pytest.raises(ValueError, match=r"line 1 of .*a.tsv' does not have the 3 columns id, a"):
        load_rows(str(tmp_path / "a.tsv"), column_names=["id", "a", "b"])


def test_parquet_with_messages(tmp_path):
    from datasets import Dataset

    rows = [
        {"prompt": [{"content": "hi", "role": "user"}]},
        {"prompt": [{"content": "ho", "role": "user"}]},
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert load_rows(str(tmp_path / "a.parquet")) == rows


def test_texts_are_separated_by_blank_lines(tmp_path):
    path = write(tmp_path, "a.txt", "one\nstory\n\n\nanother\n  \nlast\n\n")
    assert load_rows(path) == [{"text": "one\nstory"}, {"text": "another"}, {"text": "last"}]
    assert load_rows(path, separator="\n")[:2] == [{"text": "one"}, {"text": "story"}]


def test_folder_split_is_in_file_names(tmp_path):
    for name, row in (("train-0.jsonl", 0), ("train-1.jsonl", 1), ("test.jsonl", 2)):
        write(tmp_path, name, lines([ROWS[row % 2]]))
    assert load_rows(str(tmp_path)) == ROWS
    assert load_rows(str(tmp_path), split="test") == ROWS[:1]
    with pytest.raises(ValueError, match=r"no file of the split 'dev', found test.jsonl, train-0"):
        load_rows(str(tmp_path), split="dev")


def test_folder_without_splits_reads_all_files(tmp_path):
    write(tmp_path, "one/a.jsonl", lines(ROWS[:1]))
    write(tmp_path, "two/b.jsonl", lines(ROWS[1:]))
    assert load_rows(str(tmp_path)) == ROWS


def test_folder_saved_by_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert load_rows(str(tmp_path / "one")) == ROWS
    assert load_rows(str(tmp_path / "splits"), split="test") == ROWS
    with pytest.raises(ValueError, match="has no split 'train', found test"):
        load_rows(str(tmp_path / "splits"))


def test_hub_gets_name_and_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs["split"] == "dev":
            raise ValueError("Unknown split dev.\nDetails follow")
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_rows("someone/data", "main", "test") == ROWS
    assert calls == [(("someone/data", "main"), {"split": "test"})]
    with pytest.raises(
        ValueError, match=r"^'someone/data' \(name main, split dev\) is not a local file.*dev.$"
    ):
        load_rows("someone/data", "main", "dev")


def test_toy_rows_have_four_columns():
    assert set(load_rows("toy", split="test")[0]) == {"prompt", "completion", "chosen", "rejected"}


@pytest.mark.parametrize("path", ["./no/rows.jsonl", "rows.jsonl", "/no/folder", "a/b/c"])
def test_missing_file_is_refused(path):
    with pytest.raises(UserError, match=f"^there is no file or folder '{path}'$"):
        load_rows(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "prompt,answer\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"line 2 of '.*a.jsonl' is not valid JSON"),
        ("a.json", "[1]", r"row 0 of '.*a.json' is not a JSON object"),
        ("a.json", "[1", "is not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1 of .* is not a JSON object"),
        ("a.xls", "x", r"none of the suffixes .csv, .json, .jsonl, .parquet, .tsv, .txt"),
        ("empty/readme.md", "", r"has no file with a suffix .csv"),
    ],
)
def test_invalid_files_are_refused(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "empty") if "/" in name else path)
