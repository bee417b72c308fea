"""Properties for any rows and texts: round trips, named errors, counted rows."""

import csv
import json

from byte_tokenizer import byte_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_align.data.prompts import PromptData
from lit_align.data.sources import load_rows
from lit_align.data.text import encode_prompt, encode_response, stop_ids

ANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(max_size=40)  # all of Unicode but surrogates, also control characters
HUGE = "\u2028\x00\ufeff\x85film " * 2_000
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
TOKENIZER = byte_tokenizer()


@ANY
@given(rows=st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=3), min_size=1, max_size=4))
@example(rows=[{"prompt": HUGE}, {"": ""}])
def test_json_lines_round_trip(rows, tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert load_rows(str(tmp_path / "x.jsonl")) == rows


@ANY
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@example(rows=[("a\rb", "c\r\nd"), ('"', ","), ("", "e")])
def test_csv_round_trip(rows, tmp_path):
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "answer"), *rows])
    found = load_rows(str(tmp_path / "x.csv"))
    assert [(row["prompt"], row["answer"]) for row in found] == rows


@ANY
@given(prompts=st.lists(st.none() | TEXT | st.integers(), min_size=1, max_size=5))
@example(prompts=[HUGE, "a", "  ", ""])
def test_each_prompt_is_kept_counted_or_refused(prompts, tmp_path):
    lines = "\n".join(json.dumps({"prompt": prompt, "other": 1}) for prompt in prompts)
    (tmp_path / "x.jsonl").write_text(lines)
    data = PromptData(str(tmp_path / "x.jsonl"), max_prompt_tokens=60)
    data.loaded_tokenizer = TOKENIZER
    try:
        kept = data.examples(data.sources[0])
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "row " in refused
        return
    assert len(kept) + data.dropped.total() == len(prompts)
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    assert all(0 < len(example.ids) <= 60 and example.columns["other"] == 1 for example in kept)


@ANY
@given(prompt=TEXT, completion=TEXT)
@example(prompt=HUGE, completion=HUGE)
def test_response_ends_with_one_stop_and_prompt_is_unchanged(prompt, completion):
    ids, response = encode_response(TOKENIZER, prompt, completion)
    assert ids == encode_prompt(TOKENIZER, prompt)
    stops = set(stop_ids(TOKENIZER))
    assert response[-1] in stops
    assert not stops & set(response[:-1])
