"""Seeded faults: each is one real mistake of a peer or of the naive formula, and each must turn a test red.

    python -m tests.mutants [PART OF A FAULT ...]

seeds every fault (or those named) in its own copy of the tree and runs the test named beside it; says whether the fast
suite kills it (`-m "not slow"`) or the full one alone, and exits 1 if one survives. Kernels are interpreted. `seen_in`
says where the fault, or one of its kind, was found: an issue or pull request, or a peer run on the same input; without
it, it is a mistake that the formula or the layout invites.
"""

from __future__ import annotations

import sys
from ast import Add, BitAnd, Eq, Gt, GtE, Lt, LtE, Mult, NotEq, Or, Sub

from tests.seeding import (
    Fault,
    argument,
    branch,
    compare,
    constant,
    name,
    operand,
    operator,
    receiver,
    regrouped,
    run,
    without,
)

KERNELS, REST, TRAFFIC = "tests/kernels/test_kernels.py", "tests/kernels/test_rest.py", "tests/kernels/test_traffic.py"
LOOPS, SUMS, SOFT = "tests/kernels/test_loops.py", "tests/kernels/test_sums.py", "tests/api/test_soft.py"
LINEAR, AUTOGRAD = "tests/api/test_linear.py", "tests/paths/test_autograd.py"
POLICIES = "tests/policies/test_policies.py"
ROWS = f"{LOOPS}::test_rows_and_gradients_are_float64_truth_rounded_once[several threads-dtype0-1000-bonus]"

FAULTS = (
    # kernels: which classes and labels are read
    Fault(
        "every program of a split row counts the edge", "kernels/gpu/sweep.py", "sweep_edge", (compare, Eq, GtE),
        f"{KERNELS}::test_every_regime_and_path[fp32-typical-16391]",
    ),
    Fault(
        "the bound of a tile is one chunk too far", "kernels/gpu/rows.py", "chunk_mask", (compare, Lt, LtE),
        f"{KERNELS}::test_classes_in_the_middle", (2, 2),
    ),
    Fault(
        "the label is counted among the rest", "kernels/gpu/sweep.py", "without_target", (argument, "where", 2),
        f"{KERNELS}::test_one_unbatched_row",
    ),
    Fault(
        "the tile that holds the label is summed without masking it", "kernels/gpu/tiles.py", "chunks_of",
        (constant, 1, 0), f"{KERNELS}::test_every_regime_and_path[fp32-typical-5003]",
    ),
    Fault(
        "a row's alignment is that of the first row", "kernels/gpu/launching.py", "_vector", (branch, False),
        f"{TRAFFIC}::test_vectors_of_logits_and_output_start_on_16_bytes[fp32-contiguous-3]", (3, 3),
        "linkedin/Liger-Kernel PR #1430: an alignment hint that does not hold",
    ),
    Fault(
        "row offsets are int32", "kernels/gpu/rows.py", "row_index", (receiver, "to"),
        f"{KERNELS}::test_offsets_pass_int32", seen_in="Dao-AILab/flash-attention #714, linkedin/Liger-Kernel #251",
    ),
    Fault(
        "the stride of rows is the number of classes", "kernels/gpu/rows.py", "row_ptr",
        (name, "outer_stride", "n_classes"),
        f"{TRAFFIC}::test_backward_reads_and_writes_each_logit_once[3-1000-column_slice-fp32]",
        seen_in="NVIDIA/TransformerEngine #2734: a transposed input is read as contiguous",
    ),
    Fault(
        "labels past the last class are read", "kernels/gpu/rows.py", "rows_at:active", (operand, BitAnd, 0),
        f"{TRAFFIC}::test_a_label_out_of_range_reads_nothing[10-1099511627776]", (2, 3),
        "flash-attention: a plausible loss for label V; tenstorrent/tt-metal #53209",
    ),
    Fault(
        "a strided target is read as contiguous", "kernels/gpu/labels.py", "_in_order", (branch, True),
        f"{KERNELS}::test_target_strides_and_dtypes",
        seen_in="unslothai/unsloth-zoo PR #591: view of what is not contiguous",
    ),
    # kernels: sums
    Fault(
        "-inf - -inf is not guarded", "kernels/formulas/rest.py", "origin", (argument, "where", 2),
        f"{REST}::test_absorb_is_the_definition[nothing-fp32]",
        seen_in="Dao-AILab/flash-attention #1930; linkedin/Liger-Kernel 0.8.5 when a row's first block is -inf",
    ),
    Fault(
        "a merge forgets that its origin moved", "kernels/formulas/rest.py", "merge:return", (operand, Add, 0),
        f"{REST}::test_merge_is_associative[typical-fp32]", (5, 5),
    ),
    Fault(
        "float64 is summed in float32", "kernels/gpu/rows.py", "accumulable", (branch, False),
        f"{SOFT}::test_probabilities_of_another_dtype[triton-dtype4-given_dtype4]",
        seen_in="linkedin/Liger-Kernel 0.8.5 and flash-attention: float64 to 1e-7 only",
    ),
    # kernels: formulas of a row
    Fault(
        "the loss is lse - z", "kernels/formulas/scores.py", "gap_of:gap", (regrouped,),
        "tests/formulas/test_properties.py::test_01_a_common_offset_changes_nothing[10000.0]",
        seen_in="ml-explore/mlx PR #4188; Liger-Kernel and flash-attention: 1.3e-4 at an offset of 1e4",
    ),
    Fault(
        "log(1 + x) stands for log1p", "kernels/formulas/scalar.py", "log1p:return", (operand, Mult, 0),
        f"{KERNELS}::test_confident_rows_stay_ordered",
    ),
    Fault(
        "el2n leaves out the label's own term", "kernels/formulas/scores.py", "scores_of:return", (operand, Add, 1),
        f"{KERNELS}::test_every_loss[cross_entropy-fp32]",
    ),
    Fault(
        "a class at -inf without a share makes the loss NaN", "kernels/gpu/paid.py", "pay:total",
        (argument, "where", 2), f"{SOFT}::test_a_class_at_minus_infinity_without_a_share_is_not_there", (2, 2),
    ),
    Fault(
        "the pull of the negative share has the wrong sign", "kernels/gpu/sigmoid.py", "gradient_of",
        (operator, Sub, Add), "tests/api/test_sigmoid.py::test_every_loss_is_exact_in_the_kernels",
    ),
    # kernels: the gradient
    Fault(
        "ignored rows pass on what they hold", "kernels/gpu/labels.py", "backward_kernel:scale", (argument, "where", 2),
        f"{KERNELS}::test_target_strides_and_dtypes",
        seen_in="torch 2.13.0 and flash-attention: NaN gradient of an ignored row of NaN",
    ),
    Fault(
        "the upstream gradient is taken as contiguous", "kernels/gpu/labels.py", "backward_kernel:grad_loss",
        (operand, Mult, 0), f"{KERNELS}::test_reductions_are_those_of_torch[False-mean]",
        seen_in="volcengine/verl PR #6960",
    ),
    Fault(
        "the upstream gradient of each row is ignored", "kernels/gpu/labels.py", "backward_kernel:slope",
        (operand, Mult, 0), f"{KERNELS}::test_every_loss[cross_entropy-fp32]",
        seen_in="linkedin/Liger-Kernel #678: reduction='none'",
    ),
    Fault(
        "the gradient is written over the logits", "kernels/gpu/labels.py", "backward:grad",
        (argument, "empty_at_phase", 0), f"{KERNELS}::test_every_loss[cross_entropy-fp32]",
        seen_in="linkedin/Liger-Kernel #272, unslothai/unsloth #5002",
    ),
    # loops of a CPU
    Fault("a loop counts the label among the rest", "kernels/cpu/rows.py", "sums_of:d", (argument, "where", 2), ROWS),
    Fault(
        "of tied lanes the last is the runner-up", "kernels/cpu/lanes.py", "sum_up:index", (compare, Gt, GtE),
        f"{LOOPS}::test_the_runner_up_is_the_lowest_index_of_many_ties[one thread-10]",
    ),
    Fault("a loop ignores the upstream gradient", "kernels/cpu/tile.py", "pull", (operand, Mult, 0), ROWS),
    Fault(
        "sums forget the tiles before", "kernels/cpu/sums.py", "add_loop", (argument, "merge", 1),
        f"{SUMS}::test_sums_of_tiles_are_those_of_all_classes[dtype0-1-plain]",
    ),
    Fault(
        "e^x is 2e-5 too large", "kernels/cpu/scalar.py", "polynomial_of_exp:return", (constant, 1.0, 1.00002),
        f"{SUMS}::test_sums_of_tiles_are_those_of_all_classes[dtype0-1-plain]",
    ),
    Fault("threads leave out rows", "kernels/cpu/threads.py", "run:others", (constant, 1, 2), ROWS),
    Fault(
        "the runner-up is pulled as the label is", "kernels/cpu/soft_rows.py", "write", (name, "OF_OTHER", "OF_LABEL"),
        f"{SOFT}::test_every_loss_and_target[loops-fp32-log_bonus-smoothing]",
    ),
    # the linear form
    Fault(
        "the weight is taught by the last chunk alone", "bonus_ops/ops/chunks.py", "computed", (compare, Eq, GtE),
        f"{LINEAR}::test_any_budget_gives_the_same_to_rounding_and_one_the_same_bits", (2, 3),
    ),
    Fault(
        "results of ignored rows are not written", "bonus_ops/ops/chunks.py", "computed", (without, "fill_"),
        f"{LINEAR}::test_ignored_rows_may_hold_anything",
    ),
    Fault(
        "a broken upstream gradient reaches ignored rows", "bonus_ops/ops/linear.py", "_times", (branch, False),
        f"{LINEAR}::test_nothing_leaks_from_ignored_rows", (2, 7),
    ),
    Fault(
        "a gradient of the linear form is given away twice", "bonus_ops/ops/linear.py", "_times:made", (branch, False),
        f"{LINEAR}::test_a_graph_may_be_used_twice",
    ),
    Fault(
        "the norm of the last layer leaves out the bias", "bonus_ops/ops/linear.py", "_layer_norm", (operand, Add, 0),
        f"{LINEAR}::test_the_norm_of_the_last_layers_gradient_is_exact",
    ),
    Fault(
        "a weighted bonus is divided by the weights of cross-entropy", "bonus_ops/ops/linear.py", "_asked:bonus_weight",
        (operand, Mult, 0), f"{LINEAR}::test_a_bonus_of_its_own",
    ),
    # reductions, dtypes and arguments
    Fault(
        "the label keeps of its bonus what it keeps of cross-entropy", "bonus_ops/soft_targets.py",
        "SoftTargets.of_bonus:return", (name, "bonus_smoothing", "smoothing"),
        f"{SOFT}::test_the_form_of_translation_smooths_each_by_its_own", (1, 2),
        "lancopku/well-classified-examples-are-underestimated: smoothing applied alike or twice in its copies",
    ),
    Fault(
        "the mean divides by all rows, ignored ones too", "bonus_ops/call.py", "Call.divisor", (compare, NotEq, GtE),
        "tests/formulas/test_reference.py::test_without_a_bonus_it_is_torch_cross_entropy[-100-False-mean]",
        seen_in="NVIDIA/TransformerEngine PR #2476, ROCm/TransformerEngine PR #409",
    ),
    Fault(
        "autocast leaves halves", "bonus_ops/call.py", "Call.__init__:dtype", (branch, False),
        f"{AUTOGRAD}::test_autocast_gives_the_dtypes_of_torch[autocast0-dtype0-mean-numba]",
        seen_in="linkedin/Liger-Kernel #305",
    ),
    Fault(
        "labels out of range are not refused", "bonus_ops/ops/labels.py", "counted", (branch, False),
        "tests/api/test_errors.py::test_class_and_first_line_are_those_of_torch[plain-label C]", (1, 1),
        "pytorch/pytorch #135546, #66872",
    ),
    Fault(
        "blocks of losses are not added up", "kernels/cpu/labels.py", "total_loop", (operator, Add, Mult),
        f"{LOOPS}::test_a_mean_of_many_rows_is_that_of_float64", (3, 3),
    ),
    # derivatives
    Fault(
        "a second derivative goes through the opaque operator", "bonus_ops/ops/labels.py", "_Rows.backward",
        (branch, False), f"{AUTOGRAD}::test_without_a_bonus_second_derivatives_are_those_of_torch", (4, 4),
        "linkedin/Liger-Kernel, flash-attention; pytorch/pytorch #58509, #104040",
    ),
    Fault(
        "a half is scaled after it was rounded", "bonus_ops/ops/made.py", "MadeInForward.backward", (operand, Or, 1),
        f"{AUTOGRAD}::test_a_gradient_scaler_keeps_what_would_underflow[dtype0]", (2, 2),
    ),
    Fault(
        "ignored rows of spread classes cost", "bonus_ops/ops/vocab_parallel.py", "rows_of:loss",
        (receiver, "masked_fill"), "tests/paths/test_vocab_parallel.py::test_every_loss_for_one_rank",
    ),
    # what is remembered of examples, and what is done with it
    Fault(
        "of an example's rows in a batch the first is kept", "bonus_ops/dynamics/tracker.py", "ExampleTracker._rows",
        (constant, "amax", "amin"), "tests/dynamics/test_tracker.py::test_statistic_is_its_definition[mean_loss]",
    ),
    Fault(
        "a sampler loads half of a state before it refuses it", "bonus_ops/policies/sampler.py",
        "DifficultySampler.load_state_dict", (without, "_check_state"), f"{POLICIES}::test_sampler_refuses",
    ),
    Fault(
        "an unknown threshold flags nothing", "bonus_ops/policies/checks.py", "check_threshold", (branch, False),
        f"{POLICIES}::test_a_threshold_that_is_not_known_raises_where_there_is_something_to_judge[noise_mask]", (5, 5),
    ),
    Fault(
        "accuracy counts what is ignored", "bonus_ops/scores.py", "Scores.accuracy", (name, "isnan", "isinf"),
        "tests/api/test_scores_object.py::test_it_knows_what_is_right_and_accuracy_skips_the_ignored",
    ),
    Fault(
        "a file of the command line is unpickled", "bonus_ops/__main__.py", "_read", (constant, True, False),
        "tests/api/test_command_line.py::test_a_pickle_is_never_run",
    ),
)  # fmt: skip


def main() -> int:
    chosen = tuple(x for x in FAULTS if not sys.argv[1:] or any(part in x.words for part in sys.argv[1:]))
    watched = sys.stderr.isatty()
    results = run(chosen, lambda line: print(line, file=sys.stderr, flush=True) if watched else None)
    healthy = results.pop("no fault at all")
    if healthy != "survived":
        print(f"without a fault the tests fail: {healthy}")
        return 1
    for fault, result in results.items():
        print(f"{result:13}  {fault}")
    killed = [result for result in results.values() if result.startswith("killed")]
    fast = killed.count("killed (fast)")
    print(f"{len(killed)} of {len(results)} faults killed, {fast} of them by the fast suite")
    return 0 if len(killed) == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
