"""`scripts/plan_sweep.py` and its parts: traces of a few blocks are extrapolated to all blocks."""

import json
import sys
from pathlib import Path

import pytest

from lit_align.cli.discovery import import_all
from lit_align.cli.plan_run import disable_logging
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as when a script is run
try:
    import plan_sweep
    from plan_extrapolate import Extrapolation, extrapolate_peaks
    from plan_methods import SWEEP_SIZES, TRACED_BLOCKS, SweepRow, SweepSize, trace_with_blocks
finally:
    sys.path.remove(str(SCRIPTS))

SMALL = {
    "model_type": "llama",
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture
def small(tmp_path):
    """A model of six blocks on two GPUs."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL))
    return SweepSize(str(file), devices=2, prompt=16, response=8)


@pytest.mark.parametrize(
    ("method", "by"),
    [
        pytest.param("sft", "AdamW", marks=pytest.mark.long),
        pytest.param("sft", "SLTrain", marks=pytest.mark.long),
        pytest.param("remax", "AdamW", marks=pytest.mark.long),
        pytest.param("hydra_ppo", "AdamW", marks=pytest.mark.long),
    ],
)
def test_extrapolated_peaks_equal_those_of_all_blocks(method, by, small):
    import_all()
    with disable_logging():
        traces = {n: trace_with_blocks(method, by, small, n, 10**9) for n in TRACED_BLOCKS}
        expected = trace_with_blocks(method, by, small, 6, 10**9)
    extrapolation = extrapolate_peaks(traces, 6)
    assert extrapolation.deviation < 0.01
    for phase, peak in extrapolation.peaks.items():
        total = expected.peaks[phase][MemoryLocation.DEVICE].total
        assert peak.total == pytest.approx(total, rel=0.002)
        assert sum(peak.by_kind.values()) == pytest.approx(peak.total, abs=len(MemoryKind))


def tracker_with_peaks(**sizes: int) -> MemoryTracker:
    """Return a tracker of one phase with a peak at each named operator."""
    tracker = MemoryTracker()
    for name, size in sizes.items():
        tracker.total[MemoryLocation.DEVICE] = size
        tracker.bytes_by_kind[MemoryLocation.DEVICE][MemoryKind.STATE] = size
        tracker.update_peaks(name)
    tracker.end("load")
    return tracker


def test_another_operator_may_have_the_peak_with_all_blocks():
    """5 + n and 2 n: equal at 5 blocks, 25 and 40 at 20."""
    traces = {n: tracker_with_peaks(flat=5 + n, steep=2 * n) for n in (1, 2, 3)}
    extrapolation = extrapolate_peaks(traces, 20)
    peak = extrapolation.peaks["load"]
    assert (peak.total, peak.operation) == (40, "steep, forward")
    assert peak.by_kind[MemoryKind.STATE] == 40
    assert extrapolation.deviation == 0


def test_nonlinear_growth_is_reported_as_deviation():
    """n^2: the line through 9 and 16 has 2 at two blocks, which have 4."""
    traces = {n: tracker_with_peaks(square=n * n) for n in (2, 3, 4)}
    assert extrapolate_peaks(traces, 20).deviation == 0.5


def parse_sizes(*argv: str) -> dict[str, SweepSize]:
    """Return the sizes that the command line selects."""
    return plan_sweep.sweep_sizes(plan_sweep.build_parser().parse_args(argv))


def test_a_sweep_takes_any_model_and_length():
    assert parse_sizes() == {"7b": SWEEP_SIZES["7b"]}
    assert parse_sizes("--sizes", "7b", "70b") == SWEEP_SIZES
    changes = ("--prompt_tokens", "256", "--max_new_tokens", "1024", "--devices", "4")
    found = parse_sizes("--path", "shape:llama-3-8b", *changes)["llama-3-8b"]
    assert found == SweepSize("shape:llama-3-8b", devices=4, prompt=256, response=1024)
    assert (found.tokens, found.rank) == (1280, 1024)


def test_a_sweep_refuses_other_settings_and_unknown_models(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan_sweep.main(["--model.kl_coef", "1"])
    assert "unrecognized arguments: --model.kl_coef" in capsys.readouterr().err
    assert plan_sweep.main(["--path", "shape:none"]) == 2
    assert "there is no such shape" in capsys.readouterr().err


def sweep_row(method: str, size: int, deviation: float = 0.0) -> SweepRow:
    """Return the memory of a method with one phase."""
    peaks = {"load": tracker_with_peaks(op=size).peaks["load"][MemoryLocation.DEVICE]}
    return SweepRow(method, "AdamW", Extrapolation(peaks, deviation))


def test_a_sweep_prints_and_draws_every_method(monkeypatch, tmp_path, capsys):
    """Two methods of 1 and 3 GiB, of which only one fits in 2 GiB."""
    rows = [sweep_row("ppo", 2**30), sweep_row("sft", 3 * 2**30, deviation=0.02)]
    monkeypatch.setattr(plan_sweep, "sweep_methods", lambda size, memory: iter(rows))
    status = plan_sweep.main(["--gpu_memory", "2GiB", "--plot", str(tmp_path / "plan")])
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert lines[0].split()[:4] == ["ppo", "AdamW", "load", "1.00"]
    assert lines[1].endswith("inexact: blocks do not grow linearly, by 2.0%")
    assert lines[-2] == "| ppo | AdamW | 1.0 | - | - | - | - | 319 (ReMax), 220 (Hydra) |"
    assert (tmp_path / "plan_7b.csv").read_text().splitlines()[1].startswith("ppo,AdamW,1.0,-")
    assert (tmp_path / "plan_7b.png").stat().st_size > 1000


def test_a_sweep_prints_bytes_as_json(monkeypatch, capsys):
    monkeypatch.setattr(plan_sweep, "sweep_methods", lambda *given: iter([sweep_row("ppo", 7)]))
    assert plan_sweep.main(["--json", "--sizes", "70b"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"size": "70b", "method": "ppo", "by": "AdamW", "load": 7, "deviation": 0.0}
    assert {name: found[name] for name in expected} == expected
