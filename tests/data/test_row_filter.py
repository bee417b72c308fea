"""Rows that are dropped by a regular expression."""

import json

import pytest

from lit_align.data.filters import RowFilter
from lit_align.data.prompts import PromptData


def test_pattern_is_searched_in_texts_numbers_and_conversations():
    row_filter = RowFilter({"prompt": ",0$", "level": "^3"})
    talk = [{"role": "user", "content": "1,2:9,0"}]
    assert row_filter.drop_reason({"prompt": talk, "level": 1}) == "rows whose prompt matches ,0$"
    assert row_filter.drop_reason({"prompt": "a", "level": 35}) == "rows whose level matches ^3"
    assert row_filter.drop_reason({"prompt": "1,2:9,10", "level": None}) is None
    with pytest.raises(ValueError, match="there is no column 'level' to search, found prompt"):
        row_filter.drop_reason({"prompt": "a"})
    with pytest.raises(ValueError, match=r"data.drop_matching: '\(' is not a regular expression"):
        RowFilter({"prompt": "("})


def test_dropped_rows_are_counted(tmp_path, chat_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i % 3}"}) + "\n" for i in range(10)))
    data = PromptData(str(path), tokenizer=chat_path, drop_matching={"prompt": "0"}, batch_size=6)
    with caplog.at_level("INFO"):
        (batch,) = data.train_dataloader()
    assert sorted(batch.columns["prompt"]) == ["1"] * 3 + ["2"] * 3
    assert data.dropped == {"rows whose prompt matches 0": 4}
    assert "10 rows): dropped 4 rows whose prompt matches 0" in caplog.text
