"""Long curves as few points, each with the range of what it stands for."""

import math

from lit_align.runs.run_folder import Points

DownsampledCurve = dict[str, list[float]]  # x and y; lo and hi where a point stands for several


def bucket_edges(curves: list[Points], max_points: int) -> tuple[float, float]:
    """Where the first bucket begins and how wide each is, for curves that are to be compared.

    Args:
        curves: Of one metric, such as of several seeds.
        max_points: Points that may be left of a curve.
    """
    xs = sorted({x for curve in curves for x, _ in curve})
    if len(xs) <= max_points:
        return xs[0] if xs else 0.0, 0.0
    span = xs[-1] - xs[0]
    return xs[0], math.nextafter(span / max_points, math.inf) if span else 0.0


def downsample(points: Points, start: float, width: float) -> DownsampledCurve:
    """Means over buckets, with the least and the largest value in each.

    Args:
        points: By place on the x axis.
        start: Where the first bucket begins.
        width: Of a bucket; 0 leaves every point as it is.
    """
    if width == 0:
        return {
            "x": [round_to_five_digits(x) for x, _ in points],
            "y": [round_to_five_digits(y) for _, y in points],
        }
    buckets: dict[int, Points] = {}
    for x, y in points:
        buckets.setdefault(int((x - start) // width), []).append((x, y))
    values = [[y for _, y in bucket] for bucket in buckets.values()]
    return {
        "x": [round_to_five_digits(start + (bucket + 0.5) * width) for bucket in buckets],
        "y": [round_to_five_digits(math.fsum(each) / len(each)) for each in values],
        "lo": [round_to_five_digits(min(each)) for each in values],
        "hi": [round_to_five_digits(max(each)) for each in values],
    }


def round_to_five_digits(value: float) -> float:
    """Five digits, as many as a picture shows."""
    short = float(f"{value:.5g}")
    return short if math.isfinite(short) else value  # rounding up may leave the range
