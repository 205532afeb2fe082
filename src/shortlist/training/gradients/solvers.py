"""A small exact solver for weights on the simplex, so that no general one is needed. T tasks."""

from __future__ import annotations

import numpy as np

from shortlist.training.gradients.base import Floats

PASSES = 1_000
PRECISION = 1e-12


def on_simplex(gram_TT: Floats, slope_T: Floats | None = None, radius: float = 0.0) -> Floats:
    """argmin over w >= 0, sum w = 1, float64 [T]: of w'Mw, or with a slope of slope.w + radius * sqrt(w'Mw).

    Pairs of weights are exchanged, the best against the worst that is not 0, each time by the exact minimum along that line; so two
    tasks are solved in one exchange, and the gap of the optimality conditions falls by a factor with each pass.

    Args:
        gram_TT: M, positive semi-definite.
        slope_T, radius: of the second form; None and 0 = the first.
    """
    num_tasks = len(gram_TT)
    weight_T = np.full(num_tasks, 1 / num_tasks)
    for _ in range(PASSES):
        pull_T = gram_TT @ weight_T
        square = max(float(weight_T @ pull_T), 0.0)
        if slope_T is None:
            climb_T = pull_T
        elif square <= 0.0:
            return weight_T
        else:
            climb_T = slope_T + radius * pull_T / np.sqrt(square)
        to = int(climb_T.argmin())
        off = int(np.where(weight_T > 0, climb_T, -np.inf).argmax())
        if climb_T[off] - climb_T[to] <= PRECISION * float(gram_TT.max()):
            break
        line = float(pull_T[to] - pull_T[off])
        curve = float(gram_TT[to, to] + gram_TT[off, off] - 2 * gram_TT[to, off])
        if slope_T is None:
            move = -line / curve if curve > 0 else np.inf
        else:
            move = _least(float(slope_T[to] - slope_T[off]), radius, square, line, curve)
        move = min(max(move, 0.0), float(weight_T[off]))
        if move <= 0.0:
            break
        weight_T[to] += move
        weight_T[off] = 0.0 if move == weight_T[off] else weight_T[off] - move
    return weight_T


def _least(slope: float, radius: float, square: float, line: float, curve: float) -> float:
    """argmin over x of slope x + radius sqrt(square + 2 line x + curve x^2), perhaps infinite.

    With s = line + curve x the root is sqrt((s^2 + h) / curve), h = curve square - line^2 >= 0, and its derivative
    s sqrt(curve) / sqrt(s^2 + h) lies between -sqrt(curve) and sqrt(curve): the slope is balanced there or nowhere.
    """
    if curve <= 0.0:
        return np.inf if slope < 0 else -np.inf
    share = -slope / (radius * np.sqrt(curve)) if radius > 0 else -np.sign(slope) * np.inf
    if abs(share) >= 1:
        return float(np.sign(share) * np.inf)
    rest = max(curve * square - line**2, 0.0)
    return float((share * np.sqrt(rest / (1 - share**2)) - line) / curve)
