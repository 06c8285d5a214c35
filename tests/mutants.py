"""Seeded faults: each is one real mistake of a peer or of the naive formula, and each must turn a test red.

    python -m tests.mutants [PART OF A FAULT ...]

applies every fault (or those named) to its own copy of the tree and runs the test named beside it; exits 1 if one
survives. Kernels are interpreted. ``seen_in`` says where the fault, or one of the same kind, was found: an issue or
pull request, or a peer run on the same input; without it, it is a mistake that the formula or the layout invites.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
KERNELS, REST, TRAFFIC = "tests/kernels/test_kernels.py", "tests/kernels/test_rest.py", "tests/kernels/test_traffic.py"
TRANSFORMS, SCHEDULES = "tests/paths/test_transforms.py", "tests/formulas/test_schedules.py"
SIGMOID = "tests/api/test_sigmoid.py"
LOOPS = "tests/kernels/test_loops.py"
TABLE = "tests/api/test_behaviour_table.py::test_the_row_is_as_in_torch_or_deviates_as_listed"
TRACKER, USERS = "tests/dynamics/test_tracker.py", "tests/api/test_users_paths.py"
GPU_BENCH = "tests/bench/test_gpu_bench.py"
SAMPLER, SCORES_OBJECT = "tests/policies/test_sampler.py", "tests/api/test_scores_object.py"


class Mutant(NamedTuple):
    fault: str
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # node that must fail
    seen_in: str = ""  # the peer that had it


def path(case: str) -> str:
    return f"{KERNELS}::test_every_regime_and_path[{case}]"


MUTANTS = (
    # what only compiled kernels show
    Mutant(
        "threads that hold the same sum round another product of it", "kernels/gpu/rest.py",
        "return tl.where(product == 0.0, 0.0, product)", "return product",
        "tests/kernels/test_ptx.py::test_compiled_kernels_pass_the_tests_of_interpreted_ones",
    ),
    Mutant(
        "a constant of the compiler's is set twice", "kernels/gpu/sigmoid.py",
        "for axis in tl.static_range(len(shape) - 1, 0, -1):",
        "for i in tl.static_range(len(shape) - 1):\n            axis: tl.constexpr = len(shape) - 1 - i",
        f"{SIGMOID}::test_every_launch_binds_compiles_and_fits",
    ),
    # devices, and what is timed on them
    Mutant(
        "backward waits for the GPU", "kernels/gpu/labels.py",
        "    upstream = grad_loss, 0, saved[1], None\n",
        "    upstream = grad_loss, 0, saved[1], None\n    grad_loss.sum().item()\n",
        "tests/paths/test_host.py::test_nothing_waits_for_the_device",
    ),
    Mutant(
        "a wrong loss is timed", "bench/gpu/losses.py",
        "None if max(errors) < most else", "None if errors else", f"{GPU_BENCH}::test_a_wrong_loss_is_not_timed",
    ),
    Mutant(
        "what a step had measured is lost with it", "bench/gpu/__init__.py",
        'if row.endswith("}")', "if status == \"done\"",
        f"{GPU_BENCH}::test_a_step_that_hangs_or_fails_keeps_its_rows",
    ),
    # which classes are read
    Mutant(
        "the last class is dropped", "kernels/gpu/sweep.py",
        "tl.where(part == 0, rows.n_classes, 0)", "tl.where(part == 0, rows.n_classes - 1, 0)", path("fp32-typical-3"),
    ),
    Mutant(
        "the bound of a tile is one chunk too far", "kernels/gpu/rows.py",
        "(chunk < rows.n_chunks[:, None]) & where", "(chunk <= rows.n_chunks[:, None]) & where",
        path("fp32-typical-63"),
    ),
    Mutant(
        "every program of a split row counts the edge", "kernels/gpu/sweep.py",
        "tl.where(part == 0, rows.n_classes, 0)", "tl.where(part >= 0, rows.n_classes, 0)", path("fp32-typical-16391"),
    ),
    Mutant(
        "the label is counted among the rest", "kernels/gpu/sweep.py",
        'return tl.where(tl.arange(0, CHUNK)[None, None, :] == at[:, :, None], -float("inf"), z)', "return z",
        path("fp32-confident-10"),
    ),
    Mutant(
        "the tile that holds the label is summed without masking it", "kernels/gpu/tiles.py",
        "tile += tl.where(tile >= tiles.apart[j], 1, 0)", "tile += 0", path("fp32-typical-5003"),
    ),
    Mutant(
        "a row's alignment is that of the first row", "kernels/gpu/launching.py",
        "if any((s[d] - strides[d]) * size % 16 for s, _ in layouts for d in axes):", "if False:",
        f"{TRAFFIC}::test_vectors_of_logits_and_output_start_on_16_bytes[fp32-contiguous-10]",
        seen_in="linkedin/Liger-Kernel PR #1430: an alignment hint that does not hold",
    ),
    Mutant(
        "row offsets are int32", "kernels/gpu/rows.py",
        "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", f"{KERNELS}::test_offsets_pass_int32",
        seen_in="Dao-AILab/flash-attention #714, linkedin/Liger-Kernel #251, pytorch/pytorch #190139",
    ),
    # sums
    Mutant(
        "-inf - -inf is not guarded", "kernels/formulas/rest.py",
        'return tl.where(maximum == -float("inf"), 0.0, maximum)', "return maximum", path("fp32-masked-1003"),
        seen_in="Dao-AILab/flash-attention #1930; linkedin/Liger-Kernel 0.8.5 when a row's first block is -inf",
    ),
    Mutant(
        "0 * -inf is not guarded", "kernels/gpu/rest.py",
        "chunk_sum(e * tl.maximum(d, LOWEST), SPREAD)", "chunk_sum(e * d, SPREAD)", path("fp32-masked-10"),
    ),
    Mutant(
        "sums of squares are rescaled once", "kernels/gpu/rest.py",
        "rest.sum_exp2 * (scale * scale) + chunk_sum(", "rest.sum_exp2 * scale + chunk_sum(",
        f"{REST}::test_absorb_is_the_definition[typical-fp32]",
    ),
    Mutant(
        "a merge forgets that its origin moved", "kernels/formulas/rest.py",
        "(b.sum_exp_z + b.sum_exp * shift_b) * scale_b", "b.sum_exp_z * scale_b",
        f"{REST}::test_merge_is_associative[typical-fp64]",
    ),
    Mutant(
        "the entropy sum weighs by plain z", "kernels/gpu/rest.py",
        "chunk_sum(e * tl.maximum(d, LOWEST)", "chunk_sum(e * tl.maximum(z, LOWEST)", path("fp32-shifted-10"),
    ),
    Mutant(
        "log2(e) is multiplied in before the max is subtracted", "kernels/gpu/rest.py",
        "e = exp(d)", "e = tl.exp2(z * 1.4426950408889634 - at[:, :, None] * 1.4426950408889634)",
        path("fp32-far_shifted-10"),
        seen_in="pytorch/pytorch PR #195829: a common offset changes the loss",
    ),
    Mutant(
        "float64 is summed in float32", "kernels/gpu/rows.py",
        "if z.dtype == tl.float64:\n        return z\n", "if z.dtype == tl.float64:\n        return z.to(tl.float32)\n",
        path("fp64-typical-10"),
        seen_in="linkedin/Liger-Kernel 0.8.5 and flash-attention: float64 to 1e-7 only",
    ),
    # the runner-up
    Mutant(
        "a tie goes to the later tile", "kernels/gpu/rest.py",
        "tl.where(tile_max > rest.max, index", "tl.where(tile_max >= rest.max, index",
        f"{REST}::test_argmax_of_ties_is_the_smallest",
    ),
    Mutant(
        "a tie goes to the first operand", "kernels/formulas/rest.py",
        "tl.where(b.max == new_max, b.argmax, NO_CLASS)", "tl.where(b.max > a.max, b.argmax, NO_CLASS)",
        f"{REST}::test_argmax_of_ties_is_the_smallest",
    ),
    Mutant(
        "the runner-up stays a chunk", "kernels/gpu/sweep.py",
        "rest = exact_argmax(rest, rows, options, LOGIT)", "rest = rest", path("fp32-ties-10"),
    ),
    Mutant(
        "the runner-up is counted from the first vector", "kernels/gpu/sweep.py",
        "classes = rows.head[:, None] + (tl.where(found", "classes = (tl.where(found",
        f"{TRAFFIC}::test_forward_reads_each_logit_once[3-1003-contiguous-fp32]",
    ),
    # the gap and what follows from it
    Mutant(
        "the loss is lse - z", "kernels/formulas/scores.py",
        "gap = (z_target - rest.max) - tl.log(rest.sum_exp)", "gap = z_target - (rest.max + tl.log(rest.sum_exp))",
        path("fp32-shifted-10"),
        seen_in="ml-explore/mlx PR #4188; Liger-Kernel and flash-attention: 1.3e-4 at an offset of 1e4",
    ),
    Mutant(
        "log(1 + x) stands for log1p", "kernels/formulas/scalar.py",
        "return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))", "return tl.log(y)",
        f"{KERNELS}::test_confident_rows_stay_ordered",
    ),
    Mutant(
        "el2n leaves out the label's own term", "kernels/formulas/scores.py",
        "u * tl.sqrt(1.0 + purity)", "u * tl.sqrt(purity)", path("fp32-typical-10"),
    ),
    Mutant(
        "0 * inf in the entropy of a certain row", "kernels/formulas/scores.py",
        "tl.where(u == 0.0, 0.0, u * (log_odds_loss + rest_entropy))", "u * (log_odds_loss + rest_entropy)",
        path("fp32-typical-1"),
    ),
    Mutant(
        "the clamp of the bonus is forgotten", "kernels/formulas/gap_losses.py",
        "return with_bonus(gap, tl.maximum(bonus, floor), params)", "return with_bonus(gap, bonus, params)",
        f"{KERNELS}::test_every_loss[log_bonus_clamped-fp32]",
    ),
    Mutant(
        "parameters of a float64 loss are float32", "kernels/gpu/params.py",
        "halves[0][i] + halves[1][i],)", "halves[0][i],)", f"{KERNELS}::test_every_loss[log_bonus_half-fp64]",
    ),
    Mutant(
        "probabilities leave out the label's share", "kernels/gpu/labels.py",
        "scale = sigmoid(-gap) / tl.where", "scale = 1.0 / tl.where",
        f"{KERNELS}::test_softmax_from_the_same_kernel[fp32-3]",
    ),
    # labels
    Mutant(
        "an ignored class is clamped before it is compared", "kernels/gpu/rows.py",
        "& (target < n_classes) & (target != ignore_index)", "& (target < n_classes)",
        f"{KERNELS}::test_a_class_can_be_the_ignore_index",
    ),
    Mutant(
        "labels past the last class are read", "kernels/gpu/rows.py",
        "(target >= 0) & (target < n_classes)", "(target >= 0)",
        f"{TRAFFIC}::test_a_label_out_of_range_reads_nothing[10-10]",
        seen_in="flash-attention: a plausible loss for label V; tenstorrent/tt-metal #53209",
    ),
    Mutant(
        "labels below 0 are read", "kernels/gpu/rows.py",
        "(target >= 0) & (target < n_classes)", "(target < n_classes)",
        f"{TRAFFIC}::test_a_label_out_of_range_reads_nothing[10--1]",
        seen_in="flash-attention: a plausible loss for label -1",
    ),
    # the gradient
    Mutant(
        "the label's entry is that of any class", "kernels/gpu/spread.py",
        "return tl.where(classes == along(rows.target, x), along(spread.at_target, x), x)",
        "return x", path("fp32-typical-10"),
    ),
    Mutant(
        "ignored rows pass on what they hold", "kernels/gpu/labels.py",
        "pulls(tl.where(rows.ignored, 0.0, slope), sum_exp)", "pulls(slope, sum_exp)",
        f"{KERNELS}::test_ignored_rows_teach_nothing_whatever_they_hold[torch.float32-10]",
        seen_in="torch 2.13.0 and flash-attention: NaN gradient of an ignored row of NaN",
    ),
    Mutant(
        "the tail is not written", "kernels/gpu/spread.py",
        "mask = (classes < rows.n_classes) & inside",
        "mask = (classes < rows.n_classes - 1) & inside", path("fp32-typical-10"),
    ),
    Mutant(
        "every program of a split row writes the edge", "kernels/gpu/spread.py",
        "if part == 0:", "if part >= 0:",
        f"{TRAFFIC}::test_backward_reads_and_writes_each_logit_once[1-65551-offset_1-fp32]",
    ),
    Mutant(
        "the upstream gradient is taken as contiguous", "kernels/gpu/labels.py",
        "grad_loss_ptr + row * grad_loss_stride", "grad_loss_ptr + row",
        f"{TRAFFIC}::test_backward_reads_and_writes_each_logit_once[19-10-contiguous-fp32]",
        seen_in="volcengine/verl PR #6960",
    ),
    Mutant(
        "the gradient is written over the logits", "kernels/gpu/labels.py",
        "ignore_index, loss, options, empty_at_phase(logits))", "ignore_index, loss, options, logits.detach())",
        f"{KERNELS}::test_arguments_are_not_written",
        seen_in="linkedin/Liger-Kernel #272, unslothai/unsloth #5002",
    ),
    # reductions and the torch path
    Mutant(
        "the mean divides by all rows, ignored ones too", "bonus_ops/call.py",
        "return (self.target != self.ignore_index).sum().to(", "return torch.as_tensor(self.target.numel()).to(",
        f"{TABLE}[84 ignore_index -1-reference]",
        seen_in="NVIDIA/TransformerEngine PR #2476, ROCm/TransformerEngine PR #409",
    ),
    Mutant(
        "the weighted mean divides by the number of rows", "bonus_ops/call.py",
        "return row_weight.sum()", "return torch.ones_like(row_weight).sum()",
        f"{KERNELS}::test_reductions_are_those_of_torch[True-mean]",
        seen_in="pytorch/pytorch #69339, #63004: weight and mean together",
    ),
    Mutant(
        "a strided target is read as contiguous", "kernels/gpu/labels.py",
        "target if target.is_contiguous() else target.contiguous()", "target",
        f"{KERNELS}::test_target_strides_and_dtypes",
        seen_in="unslothai/unsloth-zoo PR #591: view of what is not contiguous",
    ),
    Mutant(
        "a second derivative goes through the opaque operator", "bonus_ops/ops/labels.py",
        "if torch.is_grad_enabled():  # create_graph", "if False:  # create_graph",
        "tests/paths/test_autograd.py::test_without_a_bonus_second_derivatives_are_those_of_torch",
        seen_in="linkedin/Liger-Kernel, flash-attention; pytorch/pytorch #58509, #104040",
    ),
    Mutant(
        "the reference's gradient leaves the label's entry as any class's", "bonus_ops/reference.py",
        "torch.where(is_label & counts[..., None], pull[..., None], others)", "others",
        "tests/formulas/test_reference.py::test_closed_form_gradient_is_autograd_of_rows",
    ),
    # seen in peers
    Mutant(
        "the stride of rows is the number of classes", "kernels/gpu/launching.py",
        "return Array(tensor, n_inner, n_classes, *tensor.stride())",
        "return Array(tensor, n_inner, n_classes, n_classes, n_classes, 1)",
        f"{KERNELS}::test_every_layout[padded_rows-torch.float32-1003]",
        seen_in="NVIDIA/TransformerEngine #2734: a transposed input is read as contiguous",
    ),
    Mutant(
        "logits that are not contiguous get themselves as gradient", "kernels/gpu/labels.py",
        "vector(logits, grad)\n",
        "vector(logits, grad)\n    if logits.stride(2) > 1:\n        return logits + 0\n",
        f"{KERNELS}::test_every_layout[transposed-torch.float32-1003]",
        seen_in="linkedin/Liger-Kernel 0.8.5: requires_grad is read after contiguous()",
    ),
    Mutant(
        "the upstream gradient of each row is ignored", "kernels/gpu/labels.py",
        "widen(numbers.loss, gap)) * grad_loss", "widen(numbers.loss, gap))",
        path("fp32-typical-10"), seen_in="linkedin/Liger-Kernel #678: reduction='none'",
    ),
    Mutant(
        "probabilities are exp(z - lse)", "kernels/gpu/labels.py",
        "    if grad_lse_ptr is not None:",
        "    total = tl.where(sum_exp == 0.0, 1.0, sum_exp)\n"
        "    rest_max, scale = rest_max + tl.log(total), scale * total\n    if grad_lse_ptr is not None:",
        path("fp32-shifted-10"), seen_in="flash-attention: gradient off by 5.5e-5 at an offset of 1e4",
    ),
    Mutant(
        "exponentials are rounded to halves before they are summed", "kernels/gpu/rest.py",
        "    e = exp(d)\n", "    e = exp(d).to(tl.float16).to(tl.float32)\n", path("fp16-masked-65"),
        seen_in="apple/ml-cross-entropy PR #45: a loop that must be float32",
    ),
    Mutant(
        "the label's gradient is taken from a rounded probability", "kernels/gpu/labels.py",
        "Spread(rest_max, scale, at_target)",
        "Spread(rest_max, scale, (1.0 + at_target).to(grad.ptr.dtype.element_ty).to(gap.dtype) - 1.0)",
        path("fp16-confident-10"), seen_in="apple/ml-cross-entropy #14: bfloat16 gradients differ",
    ),
    Mutant(
        "a guard of -inf swallows NaN", "kernels/gpu/rest.py",
        "    tile_max = tl.max(z, 2)\n",
        '    z = tl.where(z > -float("inf"), z, -float("inf"))\n    tile_max = tl.max(z, 2)\n',
        f"{KERNELS}::test_a_bad_logit_spoils_its_row_alone[rest-nan-10]",
        seen_in="pytorch/pytorch PR #195829: the guard must be != -inf, so that NaN passes",
    ),
    Mutant(
        "the loss is always float32", "bonus_ops/ops/labels.py",
        "loss if loss.dtype == call.dtype else loss.to(call.dtype)", "loss.to(torch.float32)",
        f"{TABLE}[46 input torch.float64-None]",
        seen_in="flash-attention: float32 from float64",
    ),
    Mutant(
        "autocast leaves halves", "bonus_ops/call.py",
        "self.dtype = torch.float32 if half and autocast else input.dtype", "self.dtype = input.dtype",
        f"{TABLE}[166 autocast to bfloat16-None]",
        seen_in="linkedin/Liger-Kernel #305",
    ),
    Mutant(
        "an unknown reduction is accepted", "bonus_ops/checks.py",
        "        _reduction.get_enum(reduction)\n", "        pass\n",
        "tests/api/test_errors.py::test_an_unknown_reduction_says_which_there_are",
        seen_in="linkedin/Liger-Kernel 0.8.5: a number for reduction='foo'",
    ),
    Mutant(
        "the length of the target is not checked", "bonus_ops/checks.py",
        "if list(target.shape) != expected and", "if False and",
        "tests/api/test_errors.py::test_class_and_first_line_are_those_of_torch",
        seen_in="linkedin/Liger-Kernel 0.8.5: reads past a short target",
    ),
    Mutant(
        "labels out of range are not refused", "bonus_ops/reference.py",
        "    if bad.any():", "    if False:",
        "tests/api/test_errors.py::test_class_and_first_line_are_those_of_torch",
        seen_in="pytorch/pytorch #135546, #66872",
    ),
    Mutant(
        "the mean of nothing is 0", "bonus_ops/ops/labels.py",
        "if n == out.loss.numel() else out.loss.sum() / n", "if n == out.loss.numel() else out.loss.sum() / (n or 1)",
        f"{TABLE}[13 all ignored, mean-None]",
        seen_in="linkedin/Liger-Kernel 0.8.5: 0.0 where torch says NaN; pytorch/torchtune #2341",
    ),
    # naive
    Mutant(
        "the sum is not rescaled when the max moves", "kernels/gpu/rest.py",
        "    scale = exp(rest.max - at)\n    return RestStats(\n        new_max,\n        tl.where(tile_max",
        "    scale = exp(new_max - at)\n    return RestStats(\n        new_max,\n        tl.where(tile_max",
        f"{REST}::test_absorb_is_the_definition[typical-fp32]",
    ),
    Mutant(
        "label -1 is ignored whatever ignore_index says", "kernels/gpu/rows.py",
        "ignored = target == ignore_index", "ignored = (target == ignore_index) | (target == -1)",
        f"{KERNELS}::test_a_label_out_of_range_makes_its_row_nan[-1-10]",
    ),
    Mutant(
        "smoothing leaves out the label", "bonus_ops/soft_targets.py",
        "Share(1 - self.smoothing, self.smoothing / max(n_classes, 1),",
        "Share(1 - self.smoothing - self.smoothing / (n_classes - 1), self.smoothing / (n_classes - 1),",
        f"{TABLE}[263 smoothing, 3-D-None]",
    ),
    Mutant(
        "the exact bonus is clamped at 1e-5", "bonus_ops/losses/log_bonus.py",
        "return log_rest if self.clamp is None else log_rest.clamp(min=self._floor())",
        "return log_rest.clamp(min=math.log(1e-5))",
        "tests/formulas/test_properties.py::test_14_no_bonus_is_plain_bitwise_and_log_end_one_is_minus_the_gap",
        seen_in="lancopku/well-classified-examples-are-underestimated: the loss saturates at -log 1e-5",
    ),
    # shares of classes
    Mutant(
        "weights apply before smoothing", "bonus_ops/soft_targets.py",
        "share = hard * self.keep + self.off\n        return share if self.weight is None else share * self.weight",
        "return (hard if self.weight is None else hard * self.weight) * self.keep + self.off",
        "tests/api/test_soft.py::test_every_loss_and_target[reference-fp64-log_bonus-weight]",
    ),
    Mutant(
        "the bonus is smoothed as cross-entropy is", "bonus_ops/soft_targets.py",
        "Share(1 - self.bonus_smoothing, self.bonus_smoothing / max(n_classes, 1),",
        "Share(1 - self.smoothing, self.smoothing / max(n_classes, 1),",
        "tests/api/test_soft.py::test_the_form_of_translation_smooths_each_by_its_own",
        seen_in="lancopku/well-classified-examples-are-underestimated: smoothing applied alike or twice in its copies",
    ),
    Mutant(
        "a weighted bonus is divided by the weights of cross-entropy", "bonus_ops/ops/soft.py",
        "targets = targets._replace(bonus_weight=call.bonus_weight * (divisor / call.divisor(None)))", "pass",
        "tests/api/test_soft.py::test_the_mean_of_a_weighted_bonus_is_over_rows",
    ),
    Mutant(
        "a class at -inf without a share makes the loss NaN", "kernels/gpu/paid.py",
        "tl.sum(tl.where(t == 0.0, 0.0, -t * d), 2)", "tl.sum(-t * d, 2)",
        "tests/api/test_soft.py::test_a_class_at_minus_infinity_without_a_share_is_not_there[None-triton]",
    ),
    Mutant(
        "the runner-up is counted twice where two sweeps are made", "kernels/gpu/soft_sweeps.py",
        "others = mask & (classes != rows.target[:, None]) & (classes != runner_up[:, None])",
        "others = mask & (classes != rows.target[:, None])",
        "tests/api/test_soft.py::test_kernels[log_bonus-smoothing-torch.float32-9]",
    ),
    Mutant(
        "the runner-up's bonus is in the mass twice where one sweep is made", "kernels/gpu/soft.py",
        "mass -= of_other.pull", "pass", "tests/api/test_soft.py::test_kernels[power_bonus-any sum-torch.float32-9]",
    ),
    Mutant(
        "the tile of the runner-up is summed whole", "kernels/gpu/tiles.py",
        "b = tl.where((b >= first) & (b < full) & (b != a), b, full)", "b = full",
        "tests/api/test_soft.py::test_label_and_runner_up_anywhere_among_whole_tiles",
    ),
    Mutant(
        "a tile is summed twice that holds both", "kernels/gpu/tiles.py",
        "(b < full) & (b != a), b, full)", "(b < full), b, full)",
        "tests/api/test_soft.py::test_label_and_runner_up_anywhere_among_whole_tiles",
    ),
    Mutant(
        "what is paid is not counted from a new max", "kernels/gpu/paid.py",
        "Paid(paid.total + total, paid.cost + paid.total * shift + cost, power)",
        "Paid(paid.total + total, paid.cost + cost, power)",
        "tests/api/test_soft.py::test_label_and_runner_up_anywhere_among_whole_tiles",
    ),
    Mutant(
        "odds are added without their denominators", "kernels/gpu/class_sums.py",
        "return n * other_d + other_n * d, d * other_d", "return n + other_n, d * other_d",
        "tests/api/test_soft.py::test_label_and_runner_up_anywhere_among_whole_tiles",
    ),
    Mutant(
        "the label's 1 - p is a difference", "kernels/formulas/soft_targets.py",
        "- one.rest * (one.pull + one.share)", "- (1.0 - one.p) * (one.pull + one.share)",
        "tests/api/test_soft.py::test_kernels[log_bonus-one-hot-torch.float32-9]",
    ),
    Mutant(
        "an edge far below 0 is counted from 0", "kernels/gpu/soft_sweeps.py",
        "edge = pay(unpaid(z), at, at,", "edge = pay(unpaid(z), 0.0 * at, at,",
        "tests/api/test_soft.py::test_a_shift_changes_no_bit_in_kernels",
    ),
    Mutant(
        "lanes are not rescaled to a new max", "kernels/gpu/paid.py",
        "power = power * exp(gamma * (before - at)) + chunk_sum", "power += chunk_sum",
        "tests/api/test_soft.py::test_kernels[power_bonus-both weights and smoothings-torch.float32-4101]",
    ),
    Mutant(
        "probabilities are walked as the logits are", "kernels/gpu/soft_targets.py",
        "array.class_stride,",
        "1,",
        "tests/api/test_soft.py::test_every_layout_in_kernels[transposed]",
    ),
    # bits that tell the batch
    Mutant(
        "a row is split by the number of rows", "kernels/gpu/launch.py",
        "while parts < 16 and", "while parts * n_rows < 528 and",
        "tests/kernels/test_determinism.py::test_a_split_row_is_merged_by_one_tree",
    ),
    # the loops of a CPU, and the gradient made in the forward visit
    Mutant(
        "a loop counts the label among the rest", "kernels/cpu/rows.py",
        "bounded(where((k == skip) | (k == skip_other), -1000.0, d))", "bounded(d)",
        f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[one thread-dtype0-64-bonus]",
    ),
    Mutant(
        "a loop takes the label for its own runner-up", "kernels/cpu/rows.py",
        "where((read(part[i]) == m) & (k != skip), k,", "where(read(part[i]) == m, k,",
        f"{LOOPS}::test_the_runner_up_is_the_lowest_index_of_many_ties[one thread-131]",
    ),
    Mutant(
        "of tied lanes the last is the runner-up", "kernels/cpu/lanes.py",
        "index[ARGMAX + i] = c if x > m else", "index[ARGMAX + i] = c if x >= m else",
        f"{LOOPS}::test_the_runner_up_is_the_lowest_index_of_many_ties[one thread-10]",
    ),
    Mutant(
        "lanes forget the block of classes before", "kernels/cpu/lanes.py",
        "column[SUM_EXP + i] += column[PART + i]", "column[SUM_EXP + i] = column[PART + i]",
        f"{LOOPS}::test_layouts_threads_and_unwritten_memory_change_nothing[one thread-sum-dtype0-65-transposed]",
    ),
    Mutant(
        "a tile numbers its classes from 0", "kernels/cpu/sums.py",
        "k = p.first_class + k if", "k = k if",
        "tests/kernels/test_sums.py::test_sums_of_tiles_are_those_of_all_classes[dtype0-64-plain]",
    ),
    Mutant(
        "sums forget the tiles before", "kernels/cpu/sums.py",
        "merge(before, RestStats(m, k, s, s2, sz))", "RestStats(m, k, s, s2, sz)",
        "tests/kernels/test_sums.py::test_sums_of_tiles_are_those_of_all_classes[dtype0-64-plain]",
    ),
    Mutant(
        "a loop charges ignored rows", "kernels/cpu/tile.py",
        "loss[i] = 0.0 if index[LABEL + i] < 0 else column[VALUE + i]", "loss[i] = column[VALUE + i]",
        "tests/api/test_functional.py::test_ignored_rows_cost_nothing_whatever_they_hold[mean-numba]",
    ),
    Mutant(
        "a label below 0 is in range", "kernels/cpu/labels.py",
        "outside = counts & ((y < 0) | (y >= n_classes))", "outside = counts & (y >= n_classes)",
        f"{LOOPS}::test_a_label_out_of_range_raises_before_a_loop_reads_by_it[labels--1]",
    ),
    Mutant(
        "a class at -inf without a share spoils a row of a loop", "kernels/cpu/soft_rows.py",
        "cost_here -= where(t == 0.0, 0.0, t * (read(part[i]) - at))", "cost_here -= t * (read(part[i]) - at)",
        "tests/api/test_soft.py::test_a_class_at_minus_infinity_without_a_share_is_not_there[None-None]",
    ),
    Mutant(
        "the runner-up is pulled as the label is", "kernels/cpu/soft_rows.py",
        "out[other] = narrow(column[OF_OTHER + GRADIENT + i] * slope)",
        "out[other] = narrow(column[OF_LABEL + GRADIENT + i] * slope)",
        "tests/api/test_soft.py::test_every_loss_and_target[loops-fp32-log_bonus-smoothing]",
    ),
    Mutant(
        "no share of an infinite loss is NaN", "kernels/cpu/sigmoid.py",
        "value += where(other == 0.0, 0.0, other * column[OTHER_VALUE + i])",
        "value += other * column[OTHER_VALUE + i]",
        "tests/api/test_sigmoid.py::test_infinite_logits_cost_the_limit_and_nan_stays[numba]",
    ),
    Mutant(
        "lines of a plane are counted without the planes before", "kernels/cpu/sigmoid.py",
        "        line //= shape[axis]\n", "", "tests/api/test_sigmoid.py::test_any_layout[numba-none-in order-sliced]",
    ),
    Mutant(
        "e^x is 2e-5 too large", "kernels/cpu/scalar.py",
        "return p * (r * r) + r + f32(1.0)", "return p * (r * r) + r + f32(1.00002)",
        f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[one thread-dtype0-64-bonus]",
    ),
    Mutant(
        "log 2 has the digits of its first part", "kernels/cpu/scalar.py",
        "y = f * z * p + k * f32(-2.12194440e-4) - f32(0.5) * z", "y = f * z * p - f32(0.5) * z",
        f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[one thread-dtype0-64-bonus]",
    ),
    Mutant(
        "a bfloat16 is cut off", "kernels/cpu/scalar.py",
        "    i = i32(i + i32(0x7FFF) + i32(i32(i >> i32(16)) & i32(1)))\n", "",
        f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[one thread-dtype2-64-bonus]",
    ),
    Mutant(
        "threads leave out the last rows", "kernels/cpu/threads.py",
        "ends = [n_rows * i // n for", "ends = [n_rows // n * i for",
        f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[several threads-dtype0-64-bonus]",
    ),
    Mutant(
        "a gradient is given away twice", "bonus_ops/ops/made.py",
        "if torch._C._autograd._get_current_graph_task_keep_graph():", "if False:",
        "tests/paths/test_autograd.py::test_a_kept_graph_gives_the_same_gradient_every_time[mean-numba]",
    ),
    Mutant(
        "a half is scaled after it was rounded", "bonus_ops/ops/made.py",
        "(grad.dtype.itemsize == 2 or not math.isfinite(factor))", "not math.isfinite(factor)",
        "tests/paths/test_autograd.py::test_a_gradient_scaler_keeps_what_would_underflow[dtype0]",
    ),
    Mutant(
        "an infinite upstream gradient reaches ignored rows", "bonus_ops/ops/made.py",
        "(grad.dtype.itemsize == 2 or not math.isfinite(factor))", "grad.dtype.itemsize == 2",
        "tests/paths/test_autograd.py::test_a_broken_upstream_gradient_leaves_ignored_rows_alone[nan-mean-numba]",
    ),
    Mutant(
        "logits written before backward are not noticed", "bonus_ops/ops/made.py",
        "ctx.save_for_backward(input, visited.grad,", "ctx.save_for_backward(input.detach().clone(), visited.grad,",
        "tests/paths/test_autograd.py::test_inputs_changed_in_place_before_backward_raise[logits-mean-numba]",
    ),
    Mutant(
        "loops take the address of a target that has none", "bonus_ops/watchers.py",
        "    for x in tensors:\n        if x is None:", "    for x in tensors[:1]:\n        if x is None:",
        "tests/paths/test_distributed.py::test_errors_are_clear",
    ),
    # what the matrix, the properties and the fuzzer are for
    Mutant(
        "the gradient forgets the strength of the bonus", "bonus_ops/losses/bonus.py",
        "self.bonus_slope(gap, p, rest)), alpha=self.strength)", "self.bonus_slope(gap, p, rest)))",
        "tests/formulas/test_properties.py::test_16_the_gradient_is_the_central_difference",
    ),
    # transforms and schedules
    Mutant(
        "a nested derivative in forward mode is 0", "bonus_ops/ops/labels.py",
        "with forward_ad._set_fwd_grad_enabled(True):", "with forward_ad._set_fwd_grad_enabled(False):",
        f"{TRANSFORMS}::test_a_transform_gives_what_torch_gives[numba-forward over forward]",
    ),
    Mutant(
        "a transform does not keep the fused visit away", "bonus_ops/watchers.py",
        "is_compiling() or is_transformed() or", "is_compiling() or",
        f"{TRANSFORMS}::test_a_transform_gives_what_torch_gives[numba-grad]",
    ),
    Mutant(
        "the columns of mapped scores are taken for the batch", "bonus_ops/ops/labels.py",
        "0 if lse else None, 1 if scores else None,", "0 if lse else None, 0 if scores else None,",
        f"{TRANSFORMS}::test_scores_and_probabilities_come_out_batched",
    ),
    Mutant(
        "a step of the schedule reaches a backward under way", "bonus_ops/ops/labels.py",
        "    loss = cast(GapLoss, call.loss).current\n    visit =", "    loss = cast(GapLoss, call.loss)\n    visit =",
        f"{SCHEDULES}::test_a_step_before_backward_does_not_reach_it",
    ),
    Mutant(
        "a new epoch is a new constant of the graph", "bonus_ops/schedules.py",
        "return self.loss._name, self._fields", "return self._current._encoded()",
        f"{SCHEDULES}::test_a_new_epoch_compiles_no_graph",
    ),
    Mutant(
        "the epoch in the state is not loaded", "bonus_ops/schedules.py",
        "            self.bonus.set_epoch(epoch)\n", "", f"{SCHEDULES}::test_the_epoch_is_in_the_state_dict",
    ),
    # the sigmoid family
    Mutant(
        "the pull of the negative share has the wrong sign", "kernels/gpu/sigmoid.py",
        "slope -= e.other * SLOPE(-e.gap, numbers)", "slope += e.other * SLOPE(-e.gap, numbers)",
        f"{SIGMOID}::test_every_loss_is_exact_in_the_kernels",
    ),
    Mutant(
        "a sum counts what lies past the end", "kernels/gpu/sigmoid.py",
        "total += tl.where(index < n, loss, 0.0)", "total += loss",
        f"{SIGMOID}::test_a_program_of_a_sum_adds_up_several_tiles",
    ),
    # users' paths
    Mutant(
        "a token is its own label", "bonus_ops/causal_lm.py",
        "value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]",
        f"{USERS}::test_causal_lm_loss_without_bonus_is_the_plain_one",
    ),
    Mutant(
        "a nested patch restores what the outermost found", "bonus_ops/patch.py",
        "functional.cross_entropy = self._replaced.pop()", "functional.cross_entropy = self._replaced[0]",
        f"{USERS}::test_patches_nest_and_re_enter",
    ),
    # training dynamics
    Mutant(
        "of an example's rows in a batch the first is kept", "bonus_ops/dynamics/tracker.py",
        'position, "amax")', 'position, "amin")', f"{TRACKER}::test_statistic_is_its_definition",
    ),
    Mutant(
        "an ignored row stands for its example", "bonus_ops/dynamics/tracker.py",
        "torch.where(scores.loss.isnan(), self.num_examples, rows)", "rows",
        f"{TRACKER}::test_statistic_is_its_definition",
    ),
    Mutant(
        "an example never learned is forgotten", "bonus_ops/dynamics/events.py",
        "before.clamp(max=FORGOTTEN)", "FORGOTTEN", f"{TRACKER}::test_statistic_is_its_definition",
    ),
    Mutant(
        "an example on the median is in the upper half", "bonus_ops/dynamics/report.py",
        "2 * (mean > cuts[0])", "2 * (mean >= cuts[0])",
        "tests/dynamics/test_tracker_report.py::test_kinds_are_the_quarters_of_the_map",
    ),
    # found by using the library as a stranger would
    Mutant(
        "a threshold of one column is compared with every row", "bonus_ops/policies/checks.py",
        "    elif value.dim() > 0:\n", "    elif False:\n",
        "tests/policies/test_policies.py::test_a_bad_argument_says_what_was_expected_and_what_came",
    ),
    Mutant(
        "groups are counted in bfloat16", "bonus_ops/policies/reweighting.py",
        "loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # bfloat16 counts", "# bfloat16 counts",
        "tests/policies/test_policies.py::test_half_precision_counts_large_batches",
    ),
    Mutant(
        "a sampler loads half of a state before it refuses it", "bonus_ops/policies/sampler.py",
        "        _check_state(state)\n", "", "tests/policies/test_policies.py::test_sampler_refuses",
    ),
    Mutant(
        "a penalty has no rule for vmap", "bonus_ops/policies/reference_penalty.py",
        "generate_vmap_rule = True", "generate_vmap_rule = False",
        "tests/policies/test_policies.py::test_kl_to_reference_under_transforms",
    ),
    Mutant(
        "the middle of the halted focal loss has no slope, as by a clamp of torch 2.15", "bonus_ops/losses/focal.py",
        "value(torch.where(gap > 0, 0.0, gap))", "value(torch.where(gap >= 0, 0.0, gap))",
        "tests/api/test_sigmoid.py::test_the_formula_is_that_of_the_paper[halted]",
    ),
    # wrong in silence for the person who trains
    Mutant(
        "a look at the loader begins another epoch", "bonus_ops/policies/sampler.py",
        "        if plan.finished:\n", "        if plan.begun:\n",
        f"{SAMPLER}::test_a_look_at_the_loader_changes_no_epoch",
    ),
    Mutant(
        "weights are of the epoch that is set, not of the one that runs", "bonus_ops/policies/sampler.py",
        "(self._begun or self._planned()).weight", "self._planned().weight",
        f"{SAMPLER}::test_an_epoch_set_while_an_iterator_runs_changes_the_next_one_only",
    ),
    Mutant(
        "a sampler saves what was handed out, whatever was trained", "bonus_ops/policies/sampler.py",
        "plan.reached if position is None else int(position)", "plan.reached",
        f"{SAMPLER}::test_a_run_that_says_what_it_trained_goes_on_there",
    ),
    Mutant(
        "what was never seen is never visited", "bonus_ops/policies/sampler.py",
        "unknown = difficulty.isnan() | (difficulty == math.inf)", "unknown = difficulty == math.inf",
        "tests/policies/test_policies.py::test_sampler_starves_nobody_that_the_tracker_has_not_seen",
    ),
    Mutant(
        "what was taken out is taken for the easiest", "bonus_ops/policies/checks.py",
        "return difficulty.masked_fill(difficulty == TAKEN_OUT, math.nan)", "return difficulty",
        "tests/policies/test_policies.py::test_what_was_taken_out_takes_no_part_as_what_is_not_known",
    ),
    Mutant(
        "an unknown threshold flags nothing", "bonus_ops/policies/denoise.py",
        '    check_threshold_is_known("noise_mask", "threshold", threshold, recent_loss)\n', "",
        "tests/policies/test_policies.py::test_a_threshold_that_is_not_known_raises_where_there_is_something_to_judge",
    ),
    Mutant(
        "a share of ints is of the default dtype", "bonus_ops/dynamics/events.py",
        'state["correct_count"].to(torch.float32)', 'state["correct_count"]',
        "tests/dynamics/test_tracker_state.py::test_no_statistic_takes_its_dtype_from_the_default",
    ),
    Mutant(
        "ignored rows rank as hardest", "bonus_ops/scores.py",
        "(~difficulty.isnan()).nonzero()", "difficulty.isnan().logical_or(~difficulty.isnan()).nonzero()",
        f"{SCORES_OBJECT}::test_the_hardest_rows_are_those_of_largest_difficulty_without_the_ignored",
    ),
    Mutant(
        "accuracy counts what is ignored", "bonus_ops/scores.py",
        "(~self.margin.isnan()).sum()", "self.margin.numel()",
        f"{SCORES_OBJECT}::test_it_knows_what_is_right_and_accuracy_skips_the_ignored",
    ),
    Mutant(
        "labels that are not shifted are compared with shifted scores", "bonus_ops/scores.py",
        "if _is_plain_cpu(differs) and differs.any():", "if False:",
        f"{SCORES_OBJECT}::test_scores_of_next_tokens_know_the_shifted_labels",
    ),
    Mutant(
        "what torch scripted of a class before the patch is used in it", "bonus_ops/patch.py",
        "    torch.jit._recursive.concrete_type_store.type_store.clear()\n", "    pass\n",
        "tests/api/test_lost_words.py::test_a_module_scripted_in_the_patch_has_its_bonus",
    ),
    Mutant(
        "a slope of the wrong sign passes", "bonus_ops/check_loss.py",
        "slope = -derivative, loss.slope(gap.detach())", "slope = -derivative, loss.slope(gap.detach()).abs()",
        "tests/formulas/test_check_loss.py::test_a_wrong_loss_is_told_what_is_wrong",
    ),
    Mutant(
        "a suggested label keeps the confidence of the one before", "bonus_ops/dynamics/suggested.py",
        'torch.where(taken_over, 0.0, state["suggested_prob"].index_select(0, rows))',
        'state["suggested_prob"].index_select(0, rows)',
        "tests/dynamics/test_tracker_report.py::test_the_suggested_label_is_voted_by_the_predictions_and_its_confidence_is_a_mean",
    ),
    Mutant(
        "a file of the command line is unpickled", "bonus_ops/__main__.py",
        'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
        "tests/api/test_command_line.py::test_a_pickle_is_never_run",
    ),
)  # fmt: skip


def kills(mutant: Mutant | None, tests: list[str], seconds: float = 240) -> str:
    """Run ``tests`` on a copy of the tree with the fault; return "killed", "survived" or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        for name in ("bonus_ops", "kernels", "tests", "bench"):
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        if mutant is not None:
            file = tree / mutant.file
            text = file.read_text()
            if text.count(mutant.old) != 1:
                return f"stale: {mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}"
            file.write_text(text.replace(mutant.old, mutant.new))
        context = multiprocessing.get_context("fork")  # the slow imports are done
        process = context.Process(target=run_tests, args=(tree, tests))
        process.start()
        process.join(timeout=seconds)
        if process.is_alive():
            process.kill()
            return "killed"  # by never ending
        # 1: a test failed; below 0: a crash; anything else ran no test
        code = process.exitcode or 0
        return "survived" if code == 0 else "killed" if code == 1 or code < 0 else f"pytest exited with {code}"


def run_tests(tree: pathlib.Path, tests: list[str]) -> None:
    import pytest

    os.chdir(tree)
    sys.path[0] = str(tree)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
    os._exit(int(code))


def run_all(mutants: tuple[Mutant, ...] = MUTANTS) -> dict[str, str]:
    """Return what became of each fault; first of all the tests must pass without one."""
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    for slow in ("torch._dynamo", "triton.runtime.interpreter", "pytest"):  # once, not in every fork
        importlib.import_module(slow)
    healthy = kills(None, sorted({mutant.test for mutant in mutants}), seconds=900)
    if healthy != "survived":
        return {"no fault at all": f"tests fail or are gone: {healthy}"}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        results = pool.map(kills, mutants, [[mutant.test] for mutant in mutants])
        return dict(zip([mutant.fault for mutant in mutants], results, strict=True))


def main() -> int:
    chosen = tuple(m for m in MUTANTS if not sys.argv[1:] or any(part in m.fault for part in sys.argv[1:]))
    results = run_all(chosen)
    for fault, result in results.items():
        print(f"{result:9} {fault}")
    alive = sum(result != "killed" for result in results.values())
    print(f"{len(results) - alive} of {len(results)} faults killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
