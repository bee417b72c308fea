"""Downsample long curves to few points, each with the range of the values that it replaces."""

import math

from lit_align.runs.run_folder import Points

DownsampledCurve = dict[str, list[float]]  # x and y; lo and hi if a point replaces several


def bucket_edges(curves: list[Points], max_points: int) -> tuple[float, float]:
    """Return the start of the first bucket and the width of each, common to several curves.

    Args:
        curves: Curves of one metric, for example of several seeds.
        max_points: Most points of a downsampled curve.

    Example:
        >>> bucket_edges([[(0.0, 1.0), (10.0, 2.0)]], max_points=600)  # few points: width 0
        (0.0, 0.0)
    """
    xs = sorted({x for curve in curves for x, _ in curve})
    if len(xs) <= max_points:
        return xs[0] if xs else 0.0, 0.0
    span = xs[-1] - xs[0]
    # slightly wider than span / max_points, so that the last x falls into the last bucket
    return xs[0], math.nextafter(span / max_points, math.inf) if span else 0.0


def downsample(points: Points, start: float, width: float) -> DownsampledCurve:
    """Return the mean, the minimum and the maximum of each bucket.

    Args:
        points: Points of a curve, sorted by x.
        start: Start of the first bucket.
        width: Width of a bucket. 0 keeps every point.

    Example:
        >>> downsample([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], start=0.0, width=2.0)
        {'x': [1.0, 3.0], 'y': [2.0, 5.0], 'lo': [1.0, 5.0], 'hi': [3.0, 5.0]}
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
    """Return a number with five digits, which is more than a plot shows.

    Example:
        >>> round_to_five_digits(1234.567)
        1234.6
    """
    short = float(f"{value:.5g}")
    return short if math.isfinite(short) else value  # rounding up may overflow to infinity
