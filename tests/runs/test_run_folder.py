"""RunFolder: config, curves, memory and responses of a run."""

import pytest
from fake_run_folder import answer, write_run

from lit_align.errors import UserError
from lit_align.report.build import report_data
from lit_align.report.downsample import bucket_edges, downsample
from lit_align.runs.run_folder import RunFolder, read_responses


def test_curves_are_over_rollouts_with_evaluation_at_last_rollout(tmp_path):
    rows = [
        {"step": 3, "iteration": 1.0, "reward": 0.5},
        {"step": 7, "iteration": 2.0, "reward": 1.5},
        {"step": 7, "val/reward": 4.0},
    ]
    run = RunFolder(write_run(tmp_path / "run", rows))
    assert run.axis == "rollouts"
    assert run.curves == {"reward": [(1.0, 0.5), (2.0, 1.5)], "val/reward": [(2.0, 4.0)]}


def test_curves_without_rollouts_are_over_optimizer_steps(tmp_path):
    rows = [{"step": 0, "loss": 2.0}, {"step": 9, "loss": 1.0}]
    run = RunFolder(write_run(tmp_path / "run", rows))
    assert run.axis == "optimizer steps"
    assert run.curves == {"loss": [(1.0, 2.0), (10.0, 1.0)]}


def test_non_finite_values_are_counted_and_not_drawn(tmp_path):
    rows = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": "nan"}, {"step": 2, "loss": "inf"}]
    run = RunFolder(write_run(tmp_path / "run", rows))
    assert run.curves == {"loss": [(1.0, 2.0)]}
    assert run.num_non_finite == 2


def test_old_log_keys_are_printed_once_and_kept(tmp_path, capsys):
    rows = [{"step": s, "objective/kl": 0.5, "rollout": s, "loss": 1.0} for s in range(2)]
    run = RunFolder(write_run(tmp_path / "run", rows))
    assert run.curves["objective/kl"] == [(1.0, 0.5), (2.0, 0.5)]
    assert run.axis == "optimizer steps"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(
        "metrics.csv has 2 column(s) of version 0.1: "
        "objective/kl was renamed to kl/per_response_k1, ..."
    )


def test_settings_have_dotted_names(tmp_path):
    run = RunFolder(write_run(tmp_path / "run", seed=3))
    assert run.config["model"] == "lit_align.algorithms.remax.ReMax"
    assert run.config["model.policy.path"] == "base"
    assert run.config["seed_everything"] == "3"


def test_memory_is_that_of_rank_with_largest_peak(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "memory.rank0.csv").write_text("phase,peak,other\nupdate,10,4\n")
    (folder / "memory.rank1.csv").write_text("phase,peak,other\nupdate,30,5\nload,1,1\n")
    memory = RunFolder(folder).memory
    assert memory == {"update": {"peak": 30.0, "other": 5.0}, "load": {"peak": 1.0, "other": 1.0}}


def test_seconds_are_means_over_rollouts(tmp_path):
    seconds = {"time/mine": 1.0, "time/prepare": 1.0, "time/update": 5.0}
    rows = [{"step": s, "iteration": s + 1.0, "time/rollout": 2.0 + s, **seconds} for s in range(3)]
    found = RunFolder(write_run(tmp_path / "run", rows)).seconds
    assert list(found.items()) == [
        ("rollout", 3.0),
        ("prepare", 1.0),
        ("update", 5.0),
        ("mine", 1.0),
    ]


def test_files_of_all_ranks_belong_to_one_rollout(tmp_path):
    tables = {name: [answer("p", name)] for name in ("rollout_00020.rank1", "rollout_00020.rank0")}
    more = {"rollout_00010": [], "held_out_00000": []}
    run = RunFolder(write_run(tmp_path / "run", completions={**tables, **more}))
    assert [*run.rollouts] == [10, 20]
    assert [*run.held_out] == [0]
    completions = [row["completion"] for row in read_responses(run.rollouts[20])]
    assert completions == ["rollout_00020.rank0", "rollout_00020.rank1"]


def test_half_last_line_is_ignored_and_other_is_error(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"score": 1}\n{"sco')
    assert read_responses([file]) == [{"score": 1}]
    file.write_text('{"sco\n{"score": 1}\n')
    with pytest.raises(ValueError, match=r"line 1 of '.*x.jsonl' is not valid JSON"):
        read_responses([file])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no metrics.csv.*Found: nothing"),
        ({"x.txt": ""}, "no metrics.csv.*Found: x.txt"),
        ({"metrics.csv": "step,loss\n"}, "has no rows yet"),
        ({"metrics.csv": "step,loss\n0,1\n", "config.yaml": "a: ["}, "config.yaml is not YAML"),
    ],
)
def test_invalid_run_folders_are_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        report_data([RunFolder(tmp_path)])
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder(tmp_path / "nowhere")


def test_short_curve_is_unchanged():
    points = [(1.0, 3.0), (2.0, 5.0)]
    assert bucket_edges([points], 2) == (1.0, 0.0)
    assert downsample(points, 1.0, 0.0) == {"x": [1.0, 2.0], "y": [3.0, 5.0]}


def test_long_curve_becomes_means_with_ranges():
    points = [(float(x), float(x % 2)) for x in range(8)]
    thin = downsample(points, *bucket_edges([points], 2))
    assert thin == {"x": [1.75, 5.25], "y": [0.5, 0.5], "lo": [0.0, 0.0], "hi": [1.0, 1.0]}


def test_seeds_are_downsampled_at_same_positions():
    one = [(float(x), 1.0) for x in range(100)]
    other = one[:60]
    where = bucket_edges([one, other], 10)
    assert downsample(other, *where)["x"] == downsample(one, *where)["x"][:6]
