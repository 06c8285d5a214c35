"""The goals on an H200 as ratios within one run, and what a run says about each.

R is the time to read the logits once, W to write as much once, at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .peers import COMPILED, EAGER, IN_FORWARD, LOSS_ONLY, OURS, PEERS
from .steps import SHAPES

MET, MISSED, NOT_MEASURED, DRY = "met", "missed", "not measured", "dry run"
LONG = tuple(shape for shape in SHAPES if shape[0] > 64)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# published, other hardware and other runs: context, no verdict
ANCHORS = (
    ((8192, 32000), "train", 0.79, "Liger-Kernel, forward and backward, H100"),
    ((8192, 128256), "train", 2.2, "Liger-Kernel, forward and backward, H100"),
    ((8192, 262144), "train", 4.6, "Liger-Kernel, forward and backward, H100"),
    ((8192, 262144), "forward", 1.36, "QuACK, forward of the loss, at the 3163 GB/s it reaches on an H100"),
)


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a goal and shape: what is wanted, the outcome, the verdict."""
    rows = [{"goal": goal, "at": at, "outcome": value, "limit": limit, "verdict": verdict(value, limit, at_most)}
            for goal, at, value, limit, at_most in _all(Times(results["steps"]))]  # fmt: skip
    return [row | {"verdict": DRY} for row in rows] if results["dry"] else rows


def verdict(value: float | None, limit: float, at_most: bool) -> str:
    if value is None:
        return NOT_MEASURED
    return MET if (value <= limit if at_most else value >= limit) else MISSED


class Times:
    """Medians in ms by what was run."""

    def __init__(self, steps: dict[str, Any]) -> None:
        self.copy = steps.get("ceilings", {}).get("copy_gb_per_s")
        self.rows = steps.get("speed", {}).get("rows", [])
        self.small = steps.get("small", {}).get("rows", [])
        self.linear = steps.get("linear", {}).get("ms", {})

    def ms(self, shape: tuple[int, int], provider: str, mode: str, dtype: str = "bf16") -> float | None:
        for row in self.rows:
            if (row["n_rows"], row["n_classes"], row["provider"], row["mode"], row["dtype"]) == (
                *shape, provider, mode, dtype,
            ):  # fmt: skip
                return row["ms"]["median"] if "ms" in row else None
        return None

    def once_ms(self, shape: tuple[int, int], dtype: str = "bf16") -> float | None:
        """Return R, which is also W: a copy counts bytes read and written."""
        return shape[0] * shape[1] * BYTES[dtype] / self.copy / 1e6 if self.copy else None

    def host_us(self, shape: tuple[int, int], provider: str) -> float | None:
        for row in self.small:
            if (row["n_rows"], row["n_classes"], row["provider"]) == (*shape, provider):
                return row.get("host_us")
        return None


def ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


Row = tuple[str, str, float | None, float, bool]


def _all(times: Times) -> Iterator[Row]:
    for shape in LONG:
        once = times.once_ms(shape)
        yield "forward with all scores / R", _at(shape), ratio(times.ms(shape, OURS, "forward"), once), 1.10, True
    for shape in LONG:
        thrice = times.once_ms(shape)
        thrice = None if thrice is None else 3 * thrice
        yield (
            "forward and backward with all scores / (2R + W)",
            _at(shape),
            ratio(times.ms(shape, OURS, "train"), thrice),
            1.10,
            True,
        )
    for shape in ((8192, 32000), (8192, 128256)):  # an option that is kept only if it wins a fifth
        once, in_forward = times.once_ms(shape), times.ms(shape, IN_FORWARD, "train")
        twice = None if once is None else 2 * once
        yield "gradient made in the forward visit / (R + W)", _at(shape), ratio(in_forward, twice), 1.20, True
        in_backward = times.ms(shape, OURS, "train")
        yield "gradient made in the forward visit / in backward", _at(shape), ratio(in_forward, in_backward), 0.80, True
    for shape in LONG:
        for mode, what in (("forward", "forward"), ("train", "forward and backward")):
            cost = ratio(times.ms(shape, OURS, mode), times.ms(shape, LOSS_ONLY, mode))
            yield f"{what} with all scores / loss alone", _at(shape), cost, 1.03, True
    for mode, what in (("forward", "forward"), ("train", "forward and backward")):
        odd, even = (8192, 50257), (8192, 50304)
        a_byte = ratio(times.ms(odd, OURS, mode), times.ms(even, OURS, mode))
        a_byte = None if a_byte is None else a_byte * even[1] / odd[1]
        yield f"{what} of 50257 / of 50304 classes, a byte", _at(odd), a_byte, 1.05, True
    few = (64, 262144)
    share = ratio(times.once_ms(few), times.ms(few, OURS, "forward"))
    yield "share of copy bandwidth of a forward of few rows", _at(few), share, 0.80, False
    for shape in ((128, 10), (128, 1000)):
        host = ratio(times.host_us(shape, OURS), times.host_us(shape, EAGER))
        yield "host time of forward and backward / F.cross_entropy", _at(shape), host, 1.0, True
    for peer in PEERS:
        if peer in (OURS, LOSS_ONLY, IN_FORWARD):
            continue
        for shape in SHAPES:
            value = ratio(times.ms(shape, OURS, "train"), times.ms(shape, peer, "train"))
            if value is not None or shape == (8192, 128256):  # said once where a peer was not there
                yield f"forward and backward with all scores / {peer}", _at(shape), value, 1.0, True
    theirs = times.linear.get("Cut Cross-Entropy", {}).get("median")
    ours = times.linear.get(OURS, {}).get("median")
    yield "product, loss, scores, gradients / Cut Cross-Entropy", "8192 x 2048 x 128256", ratio(ours, theirs), 1.0, True


def _at(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


__all__ = ["ANCHORS", "COMPILED", "MET", "MISSED", "NOT_MEASURED", "Times", "goals", "ratio", "verdict"]
