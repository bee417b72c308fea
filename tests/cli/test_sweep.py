"""`lit-align plan --sweep`: few blocks counted up to all are what all blocks take."""

import argparse
import json

import pytest

from lit_align.cli.discovery import import_all
from lit_align.cli.main import main
from lit_align.cli.plan import parser, silent, sweeping
from lit_align.cli.sweep import BLOCKS, SIZES, Size, with_blocks
from lit_align.plan.extrapolate import extrapolated
from lit_align.plan.memory_tracker import Kind, Ledger, Place

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
    return Size(str(file), devices=2, prompt=16, answer=8)


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
    with silent():
        traces = {n: with_blocks(method, by, small, n, 10**9) for n in BLOCKS}
        whole = with_blocks(method, by, small, 6, 10**9)
    grown = extrapolated(traces, 6)
    assert grown.bent < 0.01
    for phase, height in grown.heights.items():
        assert height.total == pytest.approx(whole.heights[phase][Place.DEVICE].total, rel=0.002)
        assert sum(height.by_kind.values()) == pytest.approx(height.total, abs=len(Kind))


def of_moments(**sizes: int) -> Ledger:
    """A ledger of one phase with a height at each moment."""
    ledger = Ledger()
    for name, size in sizes.items():
        ledger.total[Place.DEVICE] = ledger.held[Place.DEVICE][Kind.STATE] = size
        ledger.note(name)
    ledger.end("load")
    return ledger


def test_another_moment_may_be_the_highest_with_all_blocks():
    """5 + n and 2 n: equal at 5 blocks, 25 and 40 at 20."""
    traces = {n: of_moments(flat=5 + n, steep=2 * n) for n in (1, 2, 3)}
    grown = extrapolated(traces, 20)
    assert (grown.heights["load"].total, grown.heights["load"].moment) == (40, "steep, forward")
    assert grown.heights["load"].by_kind[Kind.STATE] == 40
    assert grown.bent == 0


def test_what_does_not_grow_evenly_is_told():
    """n^2: the line through 9 and 16 is at 2 with two blocks, which have 4."""
    traces = {n: of_moments(square=n * n) for n in (2, 3, 4)}
    assert extrapolated(traces, 20).bent == 0.5


def swept(*words: str) -> Size:
    given, others = parser().parse_known_args(["--sweep", *words])
    return sweeping(given, others)


def test_a_sweep_takes_any_model_and_length():
    assert swept() == SIZES["7b"]
    assert swept("70b") == SIZES["70b"]
    more = ("--prompt_tokens", "256", "--rollout.max_new_tokens", "1024", "--trainer.devices", "4")
    found = swept("--model.policy.path", "shape:llama-3-8b", *more)
    assert found == Size("shape:llama-3-8b", devices=4, prompt=256, answer=1024)
    assert (found.tokens, found.rank) == (1280, 1024)


def test_a_sweep_refuses_what_it_has_settings_of_its_own_for(capsys):
    assert main(["plan", "--sweep", "--model.kl_coef", "1"]) == 2
    assert "--sweep has settings of its own and takes no --model.kl_coef" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no such shape"):
        sweeping(argparse.Namespace(sweep="7b"), ["--model.policy.path", "shape:none"])
