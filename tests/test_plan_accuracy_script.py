"""`scripts/plan_accuracy.py` at the toy size on a CPU, where plans are within one percent."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as when the script is run
try:
    SCRIPT = runpy.run_path(str(SCRIPTS / "plan_accuracy.py"))
finally:
    sys.path.remove(str(SCRIPTS))

main = SCRIPT["main"]
LINE = ("--model", "toy", "--device", "cpu", "--measured", "--methods", "SFT")


def test_a_plan_stands_beside_what_was_measured(tmp_path, capfd):
    plans = tmp_path / "plans.json"
    assert main([*LINE, "--within", "0.01", "--plans", str(plans)]) == 0
    lines = capfd.readouterr().out.splitlines()
    shown = [line.split()[:2] for line in lines if line.endswith("%") and line.startswith("SFT ")]
    assert shown == [["SFT", "load"], ["SFT", "prepare"], ["SFT", "update"]]
    assert lines[-1] == "1 of 1 methods within 1%"
    assert '"toy SFT"' in plans.read_text()


def test_a_method_that_fails_says_why_and_is_no_success(capfd):
    assert main(["--model", "llama-9", "--device", "cpu", "--methods", "SFT", "--measured"]) == 1
    said = capfd.readouterr().out
    assert "no plan: ValueError: shape:llama-9: there is no such shape" in said
    assert "failed: ValueError: shape:llama-9: there is no such shape" in said


@pytest.mark.parametrize("off", [0.06, -0.06])
def test_shares_are_of_what_was_measured(off, capfd):
    print_differences = SCRIPT["print_differences"]
    assert print_differences({"load": round(1000 * (1 + off))}, {"load": 1000}, "SFT") == [
        pytest.approx(off)
    ]
    assert print_differences({}, {"update": 1000}, "SFT") == [-1.0]
