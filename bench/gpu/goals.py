"""The goals, as ratios within one run: `codegen` predicts them, `gpu` measures them.

R is the time to read the logits once, W to write as much, at the copy bandwidth of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .cases import CLASSES_1000, CUT, FEW_ROWS, GPT2_PADDED, LAYERS, LLAMA2, LLAMA3, PIXELS, ROWS, Case
from .losses import BARE, HELD, LOSS_ONLY, OF_LAYERS, OF_LOGITS, OURS

NOT_MEASURED = "not measured"
DEPTHS = (1, 2, 3, 4)  # tiles in flight


class Times(NamedTuple):
    """Times of a run, in ms."""

    copy: float | None  # bandwidth, GB/s
    by_name: dict[tuple[str, str, str], float]  # of a case, a loss and a mode

    def ms(self, case: object, loss: str, mode: str) -> float | None:
        return self.by_name.get((str(case), loss, mode))

    def once(self, case: Case) -> float | None:
        """Return R, which is also W: a copy counts bytes read and written."""
        return case.n_bytes / self.copy / 1e6 if self.copy else None


def measured(results: dict[str, Any]) -> Times:
    """Return the medians that `python -m bench gpu` recorded."""
    rows = [row for step in results["steps"].values() for row in step["rows"]]
    copy = next((row["copy_gb_per_s"] for row in rows if row.get("copy_gb_per_s")), None)
    return Times(copy, {(row["case"], row["loss"], row["mode"]): row["ms"][0] for row in rows if row.get("ms")})


class Goal(NamedTuple):
    what: str
    at: str
    value: float | None
    wanted: str

    @property
    def outcome(self) -> str:
        return NOT_MEASURED if self.value is None else f"{self.value:.2f}"


def goals(times: Times) -> Iterator[Goal]:
    ms, once = times.ms, times.once

    def over(what: str, case: object, a: str, b: str | float | None, mode: str, limit: float) -> Goal:
        under = ms(case, b, mode) if isinstance(b, str) else b
        return Goal(what, str(case), ratio(ms(case, a, mode), under), f"<= {limit:g}")

    for case in (*ROWS[:-1], *PIXELS[:2]):
        r, limit = once(case), 1.10 if case in ROWS else 1.25  # pixels may ask for 1.2 times the sectors
        yield over("forward with all scores / R", case, OURS, r, "forward", limit)
        yield over("forward and backward / (2R + W)", case, OURS, r and 3 * r, "train", limit)
    share = ratio(once(FEW_ROWS), ms(FEW_ROWS, OURS, "forward"))
    yield Goal("share of copy bandwidth, forward", str(FEW_ROWS), share, ">= 0.6")
    for case in (CLASSES_1000, LLAMA2, LLAMA3):
        for mode in ("forward", "train"):
            yield over(f"all scores / loss alone, {mode}", case, OURS, LOSS_ONLY, mode, 1.03)
    padded = once(CUT) and once(GPT2_PADDED)
    for mode in ("forward", "train"):
        even = ratio(ms(GPT2_PADDED, OURS, mode), padded)
        yield Goal(f"a byte of rows off 16 bytes / of whole vectors, {mode}", str(CUT),
                   ratio(ratio(ms(CUT, OURS, mode), once(CUT)), even), "<= 1.05")  # fmt: skip
    for case in (LLAMA2, LLAMA3, FEW_ROWS):  # kept if they win that much
        deeper = min(filter(None, (ms(case, f"depth {depth}", "forward") for depth in DEPTHS[1:])), default=None)
        yield Goal("deeper prefetch / one tile", str(case), ratio(deeper, ms(case, "depth 1", "forward")), "<= 0.95")
    for case in (CLASSES_1000, LLAMA2):
        yield over(f"{HELD} / forward and backward", case, HELD, OURS, "train", 0.80)
    for layer in LAYERS:
        yield over("last layer with all scores / three bare products", layer, OURS, BARE, "train", 1.07)
        for peer in list(OF_LAYERS)[1:]:
            yield over(f"last layer with all scores / {peer}", layer, OURS, peer, "train", 1.0)
    for peer in OF_LOGITS:
        if peer not in (OURS, LOSS_ONLY):
            for case in (CLASSES_1000, LLAMA2, LLAMA3):
                yield over(f"forward and backward with all scores / {peer}", case, OURS, peer, "train", 1.0)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
