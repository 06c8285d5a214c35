"""Scores where they are stored."""

import triton
import triton.language as tl

from ..formulas.scores import scores_of


@triton.jit
def store_scores(scores_ptr, row, n_rows, z_target, gap, rest, missing):
    """Store the five scores of each row, a column each; ``missing`` is NaN where there are none, else 0."""
    column = scores_ptr + row
    for score in tl.static_range(5):
        tl.store(column, scores_of(z_target, gap, rest)[score] + missing, row < n_rows)
        column += n_rows
