"""`lit-align plan --sweep`: few blocks counted up to all are what all blocks take."""

import argparse
import json

import pytest

from lit_align.cli.discovery import import_all
from lit_align.cli.main import main
from lit_align.cli.sweep import SWEEP_SIZES, TRACED_BLOCKS, SweepSize, trace_with_blocks
from lit_align.plan.extrapolate import extrapolate_peaks
from lit_align.plan.memory_tracker import MemoryKind, MemoryLocation, MemoryTracker

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
        ("sft", "AdamW"),
        pytest.param("sft", "SLTrain", marks=pytest.mark.long),
        pytest.param("remax", "AdamW", marks=pytest.mark.long),
        pytest.param("hydra_ppo", "AdamW", marks=pytest.mark.long),
    ],
)
def test_blocks_are_counted_up_to_all(method, by, small):
    import_all()
    with muted():
        traces = {n: trace_with_blocks(method, by, small, n, 10**9) for n in TRACED_BLOCKS}
        whole = trace_with_blocks(method, by, small, 6, 10**9)
    extrapolation = extrapolate_peaks(traces, 6)
    assert extrapolation.deviation < 0.01
    for phase, peak in extrapolation.peaks.items():
        assert peak.total == pytest.approx(
            whole.peaks[phase][MemoryLocation.DEVICE].total, rel=0.002
        )
        assert sum(peak.by_kind.values()) == pytest.approx(peak.total, abs=len(MemoryKind))


def tracker_with_peaks(**sizes: int) -> MemoryTracker:
    """A tracker of one phase with a peak at each moment."""
    tracker = MemoryTracker()
    for name, size in sizes.items():
        tracker.total[MemoryLocation.DEVICE] = tracker.bytes_by_kind[MemoryLocation.DEVICE][
            MemoryKind.STATE
        ] = size
        tracker.update_peaks(name)
    tracker.end("load")
    return tracker


def test_another_moment_may_be_the_highest_with_all_blocks():
    """5 + n and 2 n: equal at 5 blocks, 25 and 40 at 20."""
    traces = {n: tracker_with_peaks(flat=5 + n, steep=2 * n) for n in (1, 2, 3)}
    extrapolation = extrapolate_peaks(traces, 20)
    assert (extrapolation.peaks["load"].total, extrapolation.peaks["load"].operation) == (
        40,
        "steep, forward",
    )
    assert extrapolation.peaks["load"].by_kind[MemoryKind.STATE] == 40
    assert extrapolation.deviation == 0


def test_what_does_not_grow_evenly_is_told():
    """n^2: the line through 9 and 16 is at 2 with two blocks, which have 4."""
    traces = {n: tracker_with_peaks(square=n * n) for n in (2, 3, 4)}
    assert extrapolate_peaks(traces, 20).deviation == 0.5


def parse_sweep(*words: str) -> SweepSize:
    given, others = plan_parser().parse_known_args(["--sweep", *words])
    return sweep_size(given, others)


def test_a_sweep_takes_any_model_and_length():
    assert parse_sweep() == SWEEP_SIZES["7b"]
    assert parse_sweep("70b") == SWEEP_SIZES["70b"]
    more = ("--prompt_tokens", "256", "--rollout.max_new_tokens", "1024", "--trainer.devices", "4")
    found = parse_sweep("--model.policy.path", "shape:llama-3-8b", *more)
    assert found == SweepSize("shape:llama-3-8b", devices=4, prompt=256, response=1024)
    assert (found.tokens, found.rank) == (1280, 1024)


def test_a_sweep_refuses_what_it_has_settings_of_its_own_for(capsys):
    assert main(["plan", "--sweep", "--model.kl_coef", "1"]) == 2
    assert "--sweep has settings of its own and takes no --model.kl_coef" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such shape"):
        sweep_size(argparse.Namespace(sweep="7b"), ["--model.policy.path", "shape:none"])
