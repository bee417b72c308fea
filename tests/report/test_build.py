"""The report: its data, its limits of size, and that text of models is never markup."""

import json
import random
import re
from html.parser import HTMLParser
from importlib.resources import files

from fake_run_folder import answer, write_run

from lit_align.cli.main import main
from lit_align.report import completions as sampled
from lit_align.report.build import report_data, write_report
from lit_align.report.completions import SampledResponses
from lit_align.runs.run_folder import RunFolder

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- {{SCRIPT}} \u2028 \ud800"


class Tags(HTMLParser):
    """Tags and attributes of a page, and the text inside of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def build_report(*folders, **settings) -> dict:
    return report_data([RunFolder(folder) for folder in folders])


def test_a_completion_with_a_script_tag_is_not_markup(tmp_path):
    rows = [answer(EVIL, EVIL), answer([{"role": "user", "content": EVIL}], EVIL)]
    folder = write_run(
        tmp_path / "run",
        [{"step": 0, EVIL.replace("\ud800", ""): 1.0}],
        completions={"rollout_00010": json.loads(json.dumps(rows).replace("\\ud800", "?"))},
    )
    text = (folder / "completions" / "rollout_00010.jsonl").read_text()
    (folder / "completions" / "rollout_00010.jsonl").write_text(text.replace("?", "\\ud800"))
    page = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert [attrs for tag, attrs in tags.found if tag == "script"] == [
        {"id": "data", "type": "application/json"},
        {},
    ]
    assert not [tag for tag, _ in tags.found if tag == "img"]
    data = json.loads(tags.scripts[0])
    assert data["answers"][0]["c"] == EVIL.replace("\ud800", "?")
    assert "alert(" not in tags.scripts[1]


def test_the_page_allows_one_script_and_no_requests(tmp_path):
    page = write_report([write_run(tmp_path / "run")], tmp_path / "r.html").read_text()
    assert "default-src 'none'" in page
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", page)
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    script = files("lit_align.report.page").joinpath("report.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_known_metrics_have_panels_and_others_are_listed_after_them(tmp_path):
    row = {
        "step": 0,
        "iteration": 1.0,
        "reward": 1.0,
        "policy/clipfrac_avg": 0.1,
        "own/metric": 2.0,
    }
    page = build_report(write_run(tmp_path / "run", [row]))
    assert [each["metric"] for each in page["panels"]] == ["reward", "policy/clipfrac_avg"]
    assert [each["metric"] for each in page["rest"]] == ["own/metric"]
    assert page["curves"][0]["reward"] == {"x": [1.0], "y": [1.0]}


def test_runs_that_differ_only_in_the_seed_are_one_group(tmp_path):
    folders = [write_run(tmp_path / f"remax_{seed}", seed=seed) for seed in (0, 1)]
    folders.append(write_run(tmp_path / "other", kl_coef=0.2))
    page = build_report(*folders)
    assert page["arms"] == [
        {"name": "remax, 2 seeds", "runs": [0, 1]},
        {"name": "other", "runs": [2]},
    ]
    differing = {each["name"] for each in page["config"] if each["differs"]}
    assert differing == {"seed_everything", "trainer.default_root_dir", "model.kl_coef"}


def test_runs_with_equal_folder_names_get_distinct_names(tmp_path):
    folders = [write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [run["name"] for run in build_report(*folders)["runs"]] == ["a/run", "b/run"]


def test_worst_best_and_repeated_rows_are_shown_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "NUM_ROWS", 2)
    first = [answer(f"p{i}", "a", score=i) for i in range(50)]
    last = [answer("p25", "b"), *[answer(f"q{i}", "b", score=1.0) for i in range(9)]]
    folder = write_run(
        tmp_path / "run", completions={"rollout_00010": first, "rollout_00020": last}
    )
    kept = SampledResponses(10**6, 1)
    kept.add(RunFolder(folder), 0)
    before = {sampled.row_score({"score": row["s"]}) for row in kept.rows if row["o"] == 0}
    assert before == {0.0, 1.0, 48.0, 49.0, 25.0}
    assert kept.notes == [f"run: {len(kept.rows)} of 60 responses are shown."]


def test_held_out_responses_are_in_the_order_of_training(tmp_path):
    tables = {"held_out_00020": "c", "held_out_00000": "a", "held_out_00010": "b"}
    completions = {name: [answer("p", text)] for name, text in tables.items()}
    kept = SampledResponses(10**6, 1)
    kept.add(RunFolder(write_run(tmp_path / "run", completions=completions)), 0)
    found = [(row["c"], row["t"]) for row in sorted(kept.rows, key=lambda row: row["o"])]
    assert found == [
        ("a", "held out, before training"),
        ("b", "held out, rollout 10"),
        ("c", "held out, rollout 20"),
    ]


def test_responses_stay_within_the_limit_of_bytes(tmp_path):
    folder = write_run(
        tmp_path / "run", completions={"rollout_00010": [answer(i, "ü" * 400) for i in range(40)]}
    )
    kept = SampledResponses(9_000, 1)
    kept.add(RunFolder(folder), 0)
    assert 8_000 < len(json.dumps([kept.rows, kept.prompts], ensure_ascii=False).encode()) < 9_300


def test_the_middle_of_a_long_response_is_replaced_by_a_note():
    text = sampled.truncate_middle("a" * 1500 + "b" * 1234 + "c" * 1500)
    assert text == "a" * 1500 + "\n[... 1,234 characters left out ...]\n" + "c" * 1500


def test_three_runs_of_5000_steps_fit_into_ten_megabytes(tmp_path):
    draw = random.Random(0)
    names = ["reward", "kl/per_response_k1", *[f"metric/{i}" for i in range(20)]]
    rows = [
        {"step": s, "iteration": float(s + 1), **{name: draw.gauss(0, 1) for name in names}}
        for s in range(5000)
    ]
    text = "".join(draw.choice("abcdefgh ü<") for _ in range(4000))
    table = [answer(f"prompt {i}", f"{i}{text}", draw.random()) for i in range(64)]
    files = {f"rollout_{n:05d}": table for n in range(10, 100, 10)}
    folders = [write_run(tmp_path / str(seed), rows, seed, completions=files) for seed in range(3)]
    out = write_report(folders, tmp_path / "report.html")
    assert 1e6 < out.stat().st_size < 10e6


def test_the_command_writes_the_page(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "r.html")]) == 0
    assert "Open it in a browser." in capsys.readouterr().out
    assert (tmp_path / "new" / "r.html").is_file()


def test_a_missing_run_folder_is_a_message(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run folder." in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "required: RUN. See lit-align report --help." in capsys.readouterr().err
