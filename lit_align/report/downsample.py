"""Long curves as few points, each with the range of what it stands for."""

import math

from lit_align.runs.run_folder import Points

Thin = dict[str, list[float]]  # x and y; lo and hi where a point stands for several


def edges(curves: list[Points], most: int) -> tuple[float, float]:
    """Where the first bucket begins and how wide each is, for curves that are to be compared.

    Args:
        curves: Of one metric, such as of several seeds.
        most: Points that may be left of a curve.
    """
    places = sorted({x for curve in curves for x, _ in curve})
    if len(places) <= most:
        return places[0] if places else 0.0, 0.0
    span = places[-1] - places[0]
    return places[0], math.nextafter(span / most, math.inf) if span else 0.0


def thinned(points: Points, start: float, width: float) -> Thin:
    """Means over buckets, with the least and the largest value in each.

    Args:
        points: By place on the x axis.
        start: Where the first bucket begins.
        width: Of a bucket; 0 leaves every point as it is.
    """
    if width == 0:
        return {"x": [rounded(x) for x, _ in points], "y": [rounded(y) for _, y in points]}
    buckets: dict[int, Points] = {}
    for x, y in points:
        buckets.setdefault(int((x - start) // width), []).append((x, y))
    values = [[y for _, y in bucket] for bucket in buckets.values()]
    return {
        "x": [rounded(start + (place + 0.5) * width) for place in buckets],
        "y": [rounded(math.fsum(each) / len(each)) for each in values],
        "lo": [rounded(min(each)) for each in values],
        "hi": [rounded(max(each)) for each in values],
    }


def rounded(value: float) -> float:
    """Five digits, as many as a picture shows."""
    short = float(f"{value:.5g}")
    return short if math.isfinite(short) else value  # rounding up may leave the range
