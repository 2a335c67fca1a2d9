"""Images that are cut into square tiles, which the vision graph takes as its batch: grids of them,
and what part of the picture each row stands for.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Grid = tuple[int, int]
"""Rows and columns of tiles."""


@lru_cache(maxsize=16)
def grids(least: int, most: int) -> tuple[Grid, ...]:
    """Return the grids of ``least`` to ``most`` tiles, small ones first, then narrow ones."""
    found = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if rows * columns >= least
    ]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def best_grid(height: int, width: int, side: int, least: int, most: int) -> Grid:
    """Return the grid whose shape comes nearest to that of a picture.

    Of equally near ones the last counts whose area is less than twice the picture's.
    """
    best, nearest = (1, 1), float("inf")
    for rows, columns in grids(least, most):
        distance = abs(width / height - columns / rows)
        larger = width * height > 0.5 * side * side * rows * columns
        if distance < nearest or (distance == nearest and larger):
            best, nearest = (rows, columns), distance
    return best


def tile_boxes(grid: Grid, edge: int, whole: str) -> np.ndarray:
    """Return the parts of a picture (N, 4) that the rows of its tiles stand for.

    Args:
        grid: of the tiles, row by row.
        edge: rows along a side of a tile.
        whole: whether the whole picture is a tile, too, ``first`` or ``last``; "": it is not.
    """
    parts = [
        _cells((row / grid[0], column / grid[1]), (1 / grid[0], 1 / grid[1]), edge)
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    if whole:
        parts.insert(0 if whole == "first" else len(parts), _cells((0, 0), (1, 1), edge))
    return np.concatenate(parts)


def _cells(start: tuple[float, float], size: tuple[float, float], edge: int) -> np.ndarray:
    """Return the boxes of edge x edge cells of a part of a picture: left, top, right, bottom."""
    down, across = np.divmod(np.arange(edge * edge), edge)
    corners = [
        start[axis] + (cell + more) * size[axis] / edge
        for more in (0, 1)
        for axis, cell in ((1, across), (0, down))
    ]
    return np.stack(corners, 1)
