"""Curves: one panel per metric, and no picture without metrics."""

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from tiny_models import tiny

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.curves import Curves, draw_curves

PNG = b"\x89PNG\r\n"


@pytest.fixture
def panels(monkeypatch) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each drawn panel by title."""
    seen: dict[str, list[tuple[float, float]]] = {}

    def keep(figure: Figure, *_, **__) -> None:
        for axes in figure.axes:
            (line,) = axes.lines
            seen[axes.get_title()] = [tuple(point) for point in line.get_xydata().tolist()]

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


def test_metrics_with_values_are_drawn(tmp_path, panels):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("loss,step,val/loss\n2.0,0,\n1.0,1,\n,1,1.5\n")
    draw_curves(metrics, ("loss", "val/loss", "reward"), tmp_path / "curves.png")
    assert panels == {"loss": [(0, 2), (1, 1)]}  # a single value is no curve


def test_many_metrics_fill_several_rows(tmp_path, panels):
    names = tuple("abcdef")
    (tmp_path / "metrics.csv").write_text("step,a,b,c,d,e,f\n0,1,1,1,1,1,1\n1,1,1,1,1,1,1\n")
    draw_curves(tmp_path / "metrics.csv", names, tmp_path / "curves.png")
    assert tuple(panels) == names


def test_file_without_metrics_makes_no_picture(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,step\n2.0,0\n")
    draw_curves(tmp_path / "metrics.csv", ("reward",), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("every", "drawn"), [(1, True), (50, False)])
def test_run_that_logged_ends_with_picture(run, tmp_path, every, drawn):
    logger = CSVLogger(tmp_path, name="", version="")
    run(
        ReMax(policy=tiny),
        logger=logger,
        log_every_n_steps=every,
        limit_val_batches=0,
        callbacks=[Curves(metrics=("loss", "reward"))],
    )
    picture = tmp_path / "curves.png"
    assert picture.exists() == drawn
    if drawn:
        assert picture.read_bytes().startswith(PNG)


def test_other_loggers_are_ignored(run, tmp_path):
    run(ReMax(policy=tiny), callbacks=[Curves()])
    assert not list(tmp_path.glob("**/*.png"))
