"""Sums of class terms over the last axis: of classes with p <= 1/2, all or those of a mask, where p is 0."""

import triton
import triton.language as tl

from ..formulas.scalar import log_of_rest, reciprocal
from .rest import chunk_sum, rounded


@triton.jit
def sums_of_terms(TERMS: tl.constexpr, mask, p, log_p, share, params, SPREAD: tl.constexpr):
    value, pull = TERMS(p, 1.0 - p, log_p, log_p, share, params)  # 1 - p is at least 1/2: its log is not looked at
    if mask is not None:
        value, pull = tl.where(mask, value, 0.0), tl.where(mask, pull, 0.0)
    return tl.sum(value, 2), tl.sum(pull, 2)


@triton.jit
def add_fractions(n, d, other_n, other_d):
    return n * other_d + other_n * d, d * other_d


@triton.jit
def add_fractions_alike(n, d, other_n, other_d):
    """As `add_fractions`, with the same bits in both threads of a pair."""
    return rounded(n * other_d) + rounded(other_n * d), d * other_d


@triton.jit
def log_bonus_below_half_sums(TERMS: tl.constexpr, mask, p, log_p, share, params, SPREAD: tl.constexpr):
    """One division a tile and, where all shares are the same, one logarithm; what is masked adds 0 to both."""
    rest = 1.0 - p
    if len(share.shape) == 0:
        odds, product = tl.reduce((p, rest), 2, add_fractions_alike if SPREAD else add_fractions)
        value, odds = share * tl.log(product), share * odds
    else:
        odds, product = tl.reduce((share * p, rest), 2, add_fractions_alike if SPREAD else add_fractions)
        value = chunk_sum(share * log_of_rest(p), SPREAD)
    return params[0] * value, params[0] * odds * reciprocal(product)
