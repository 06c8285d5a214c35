"""Two gloo ranks: DistributedDataParallel, FSDP2, output layers by classes, and DTensors. As a script, one rank."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bonus_ops import (
    LinearBonusCrossEntropyLoss,
    LogBonus,
    PowerBonus,
    SoftmaxSquaredError,
    bonus_cross_entropy,
    bonus_cross_entropy_with_softmax,
    linear_bonus_cross_entropy,
    linear_bonus_cross_entropy_with_scores,
    linear_difficulty_scores,
)

pytestmark = pytest.mark.slow

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

N_RANKS = 2
TIMEOUT = 120  # seconds for both ranks, of which importing torch takes 3 to 10

# name: shape of the logits, how they are sharded ("R", or the axis), options; of these two are about the target:
# "probabilities", and "plain", a tensor that every rank has whole
CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "mean": ((6, 7), 0, {}),
    "sum": ((6, 7), 0, {"reduction": "sum"}),
    "none": ((6, 7), 0, {"reduction": "none"}),
    "uneven": ((5, 7), 0, {}),
    "a-rank-without-rows": ((1, 7), 0, {"reduction": "none"}),
    "plain": ((6, 7), 0, {"bonus": None}),
    "power": ((6, 7), 0, {"bonus": PowerBonus(gamma=2.0, strength=0.5)}),
    "weight": ((5, 7), 0, {"weight": (torch.arange(7) + 1.0) / 4}),
    "smoothing": ((5, 7), 0, {"label_smoothing": 0.1}),
    "smoothing-none": ((6, 7), 0, {"label_smoothing": 0.1, "reduction": "none"}),
    "smoothing-z-loss": ((5, 7), 0, {"label_smoothing": 0.1, "z_loss": 0.1}),
    "replicated": ((5, 7), "R", {}),
    "classes": ((5, 7), 1, {}),
    "classes-none": ((5, 7), 1, {"reduction": "none", "bonus": PowerBonus(gamma=2.0, strength=0.5)}),
    "classes-plain-target": ((5, 7), 1, {"plain": True}),
    "classes-weight": ((5, 7), 1, {"weight": (torch.arange(7) + 1.0) / 4}),
    "classes-extra-dimension": ((4, 7, 3), 1, {}),
    "classes-smoothing": ((5, 7), 1, {"label_smoothing": 0.1}),
    "classes-smoothing-plain": ((5, 7), 1, {"label_smoothing": 0.1, "bonus": None, "plain": True}),
    "classes-smoothing-none": ((5, 7), 1, {"label_smoothing": 0.1, "reduction": "none", "z_loss": 0.1, "softcap": 3.0}),
    "classes-smoothing-weight": ((4, 7, 3), 1, {"label_smoothing": 0.1, "weight": (torch.arange(7) + 1.0) / 4}),
    "classes-options": ((5, 7), 1, {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5}),
    "classes-of-all": ((5, 7), 1, {"bonus": SoftmaxSquaredError()}),
    "extra-dimension": ((4, 7, 3), 0, {"reduction": "none"}),
    "extra-dimension-uneven": ((5, 7, 3), 0, {"reduction": "none"}),
    "extra-dimension-sharded": ((4, 7, 3), 2, {}),
    "probabilities": ((5, 7), 0, {"probabilities": True}),
    "probabilities-none": ((6, 7), 0, {"probabilities": True, "reduction": "none"}),
    "probabilities-classes": ((5, 7), 1, {"probabilities": True}),
    "plain-target": ((5, 7), 0, {"plain": True}),
    "plain-target-smoothing": ((5, 7), 0, {"plain": True, "label_smoothing": 0.1}),
    "plain-probabilities": ((5, 7), 0, {"plain": True, "probabilities": True}),
}


def example(shape: tuple[int, ...], probabilities: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels, the second label ignored, or probabilities; the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=generator) * 4
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    if shape[0] > 1:
        target[1] = -100
    if probabilities:
        target = (torch.randn(shape, generator=generator) * 2).softmax(1)
    return logits, target


def model() -> torch.nn.Module:
    layer = torch.nn.Linear(7, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 35).view(5, 7).sin())
        layer.bias.copy_(torch.linspace(0, 1, 5))
    return layer


class Tokens(torch.nn.Module):
    """A model of tokens: an embedding, and either an output layer or a head that is layer and loss."""

    def __init__(self, head: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.tok = torch.nn.Embedding(7, 4)
        self.output = torch.nn.Linear(4, 7, bias=False) if head is None else head
        with torch.no_grad():
            for i, x in enumerate(self.parameters()):
                x.copy_(torch.linspace(-3, 3, x.numel()).view_as(x).add(i).sin() * 2)

    def forward(self, tokens: torch.Tensor, *target: torch.Tensor) -> torch.Tensor:
        return self.output(self.tok(tokens), *target)


TOKENS = torch.arange(12).view(2, 2, 3) % 7  # of two ranks
NEXT = (TOKENS + 1) % 7
NEXT[1, 0, 1] = -100
HEADS: dict[str, dict[str, Any]] = {
    "head": {}, "head-sum": {"reduction": "sum"}, "head-none": {"reduction": "none"},
    "head-smoothing": {"label_smoothing": 0.1, "bias": False},
}  # fmt: skip
LAYERS: dict[str, dict[str, Any]] = {
    "colwise": {}, "colwise-none": {"reduction": "none"}, "colwise-plain": {"bonus": None},
    "colwise-smoothing": {"label_smoothing": 0.1},
}  # fmt: skip


def head_of(options: dict[str, Any]) -> torch.nn.Module:
    return LinearBonusCrossEntropyLoss(4, 7, **options)


def fully_sharded_gradients(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh, found = init_device_mesh("cpu", (N_RANKS,)), {}
    for name, options in {"fsdp": None, **{f"fsdp-{name}": x for name, x in HEADS.items()}}.items():
        model = Tokens(None if options is None else head_of(options))
        fully_shard(model.output, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if options is None:
            loss = bonus_cross_entropy(model(TOKENS[rank]).flatten(0, 1), NEXT[rank].flatten())
        else:
            loss = model(TOKENS[rank], NEXT[rank])
        loss.sum().backward()
        found[name] = [p.grad.full_tensor() for p in model.parameters()]
    return found


def column_parallel_results(rank: int) -> dict[str, Any]:
    """Output layers as torchtitan builds them; the whole target is plain, the same on both ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from bonus_ops import vocab_parallel

    # the data's dimension has one rank: FSDP2 on top of the classes'
    mesh, found = init_device_mesh("cpu", (1, N_RANKS), mesh_dim_names=("dp", "tp")), {}
    colwise = ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)
    for under_fsdp in (False, True):
        for name, options in LAYERS.items():
            model = Tokens()
            parallelize_module(model, mesh["tp"], {"output": colwise})
            if under_fsdp:
                fully_shard(model.output, mesh=mesh["dp"])
                fully_shard(model, mesh=mesh["dp"])
            logits = model(TOKENS[0])
            assert isinstance(logits, DTensor) and logits.placements == (Shard(2),)
            loss = bonus_cross_entropy(logits.flatten(0, 1), NEXT[1].flatten(), **options)
            loss.sum().backward()
            grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
            found[f"{name}-fsdp" if under_fsdp else name] = loss.full_tensor().detach(), grads
    for name, options in LAYERS.items():  # the layer's shard itself, without its logits
        model = Tokens()
        parallelize_module(model, mesh["tp"], {"output": colwise})
        weight = model.output.weight.to_local()
        loss = vocab_parallel.linear_bonus_cross_entropy(
            model.tok(TOKENS[0]), weight, NEXT[1], group=mesh.get_group("tp"), class_range=(4 * rank, 4 + 3 * rank),
            **options,
        )  # fmt: skip
        loss.sum().backward()
        grads = [model.tok.weight.grad, model.output.weight.grad.full_tensor()]
        found[f"{name}-linear"] = loss.detach().flatten(), grads
    for name, options in LAYERS.items():  # the layer's DTensor, beside hidden states that are plain or cut by positions
        for how in ("dtensor", "sequence"):
            model = Tokens()
            parallelize_module(model, mesh["tp"], {"output": colwise})
            hidden, target = model.tok(TOKENS[0]), NEXT[1]
            if how == "sequence":
                hidden = DTensor.from_local(hidden, mesh["tp"], [Replicate()]).redistribute(mesh["tp"], [Shard(1)])
                target = DTensor.from_local(target, mesh["tp"], [Replicate()])
            loss, scores = linear_bonus_cross_entropy_with_scores(hidden, model.output.weight, target, **options)
            alone = linear_bonus_cross_entropy(hidden, model.output.weight, target, **options)
            loss.sum().backward()
            grads = [model.tok.weight.grad, model.output.weight.grad.full_tensor()]
            found[f"{name}-{how}"] = loss.detach().flatten(), grads
            assert type(loss) is torch.Tensor and torch.equal(loss, alone)
            found[f"scores-{how}"] = [*scores, *linear_difficulty_scores(hidden, model.output.weight, target)]

    def error(weight: Any, **options: Any) -> tuple[str, str]:
        try:
            linear_bonus_cross_entropy(model.tok(TOKENS[0]), weight, NEXT[1], **options)
        except Exception as raised:
            return type(raised).__name__, str(raised)
        return "nothing", ""

    weight = model.output.weight.detach()
    found["linear errors"] = [
        error(weight.redistribute(mesh["tp"], [Shard(1)])), error(weight, linear_bias=torch.zeros(7)),
        error(weight, implementation="numba"),
    ]  # fmt: skip
    return found


def rank_main(rank: int, folder: str) -> None:
    import torch.distributed as dist

    assert "bonus_ops.distributed" not in sys.modules, "bonus_ops must not import its rule"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=N_RANKS, init_method=f"file://{folder}/store")
    results = {**sharded_results(), "ddp": data_parallel_gradients(rank),
               **fully_sharded_gradients(rank), **column_parallel_results(rank)}  # fmt: skip
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at times a thread of gloo's outlives the interpreter, which then aborts


def data_parallel_gradients(rank: int) -> list[torch.Tensor]:
    inputs, _ = example((8, 7))
    target = torch.arange(8) % 5
    parallel = torch.nn.parallel.DistributedDataParallel(model())
    mine = slice(4 * rank, 4 * rank + 4)
    bonus_cross_entropy(parallel(inputs[mine]), target[mine]).backward()
    return [p.grad for p in parallel.parameters()]


def sharded_results() -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    from bonus_ops.distributed import register_row_sharding

    mesh = init_device_mesh("cpu", (N_RANKS,))

    def spread(
        shape: tuple[int, ...], where: Any, probabilities: bool = False, plain: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, target = example(shape, probabilities)
        placement = Replicate() if where == "R" else Shard(where)
        rows = placement if where in ("R", 0) else Replicate()
        logits = distribute_tensor(logits, mesh, [placement])
        return logits.requires_grad_(), target if plain else distribute_tensor(target, mesh, [rows])

    def error(*args: Any) -> tuple[str, str]:
        try:
            bonus_cross_entropy(*args)
        except Exception as raised:
            return type(raised).__name__, str(raised)
        return "nothing", ""

    results: dict[str, Any] = {"unregistered": error(*spread((6, 7), 0))}
    register_row_sharding()
    register_row_sharding()  # once is enough, twice is harmless
    for name, (shape, where, options) in CASES.items():
        options = dict(options)
        logits, target = spread(shape, where, options.pop("probabilities", False), options.pop("plain", False))
        if "weight" in options:
            options["weight"] = distribute_tensor(options["weight"], mesh, [Replicate()])
        with CommDebugMode() as sent:
            loss = bonus_cross_entropy(logits, target, **options)
            loss.sum().backward()
        placements = (str(loss.placements[0]), str(logits.grad.placements[0]))
        counts = {str(op): n for op, n in sent.get_comm_counts().items()}
        results[name] = loss.full_tensor().detach(), logits.grad.full_tensor(), placements, counts
    logits, target = spread((5, 7), 0)
    loss, scores, softmax = bonus_cross_entropy_with_softmax(logits, target)
    results["scores"] = [x.full_tensor() for x in (*scores, softmax)]
    assert all(x.placements == (Shard(0),) for x in (*scores, softmax))
    logits, target = spread((5, 7), 1)
    _, scores, softmax = bonus_cross_entropy_with_softmax(logits, target)
    assert softmax.placements == (Shard(1),) and all(x.placements == (Replicate(),) for x in scores)
    results["classes-scores"] = [x.full_tensor() for x in (*scores, softmax)]
    logits, target = spread((5, 7), 0)
    results["mixed"] = error(example((5, 7))[0].requires_grad_(), target)
    compiled = torch.compile(bonus_cross_entropy, backend="aot_eager", fullgraph=True)
    logits, target = spread((6, 7), 0)
    loss = compiled(logits, target)
    loss.backward()
    results["compiled"] = loss.full_tensor().detach(), logits.grad.full_tensor()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may not resolve
    command = [sys.executable, __file__, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(N_RANKS)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * N_RANKS, "\n".join(said)
    loaded: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return loaded


def alone(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradient of one process."""
    probabilities = options.get("probabilities", False)
    options = {name: x for name, x in options.items() if name not in ("plain", "probabilities")}
    logits, target = example(shape, probabilities)
    logits = logits.to(dtype).requires_grad_()
    target = target.to(dtype) if probabilities else target
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = bonus_cross_entropy(logits, target, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("name", CASES)
def test_dtensor_equals_one_process(results: dict[str, Any], name: str) -> None:
    shape, _, options = CASES[name]
    loss, grad, _, _ = results[name]
    for what, got, eager, truth in zip(
        ("loss", "grad"), (loss, grad), alone(shape, options, torch.float32), alone(shape, options, torch.float64),
        strict=True,
    ):  # fmt: skip
        # 2^-22: ranks add their rows in another order
        assert_within_budget(got, truth, eager, what=f"{name}: {what}")


def test_rows_stay_where_they_are(results: dict[str, Any]) -> None:
    for name in ("none", "smoothing-none", "a-rank-without-rows", "extra-dimension", "probabilities-none"):
        assert results[name][2:] == (("S(0)", "S(0)"), {}), name
    for name in ("mean", "uneven", "power", "weight", "smoothing"):
        # the divisor, a scalar, forward and backward
        assert results[name][2:] == (("P(sum)", "S(0)"), {"c10d_functional.all_reduce": 2}), name
    assert results["sum"][2:] == (("P(sum)", "S(0)"), {})
    assert results["replicated"][2:] == (("R", "R"), {})


def test_classes_stay_where_they_are(results: dict[str, Any]) -> None:
    for name in ("classes", "classes-none", "classes-plain-target", "classes-weight", "classes-extra-dimension"):
        # sums of each rank's classes, forward; nothing backward
        assert results[name][2:] == (("R", "S(1)"), {"c10d._allgather_base_": 1}), name


def test_the_z_loss_of_spread_classes_asks_for_the_logit_of_the_label(results: dict[str, Any]) -> None:
    sent = {"c10d._allgather_base_": 1, "c10d_functional.all_reduce": 1}
    assert results["classes-options"][2:] == (("R", "S(1)"), sent)


def test_smoothed_classes_stay_too(results: dict[str, Any]) -> None:
    for name in ("classes-smoothing", "classes-smoothing-none", "classes-smoothing-weight"):
        # what a smoothed bonus pays is known when the sums are
        assert results[name][2:] == (("R", "S(1)"), {"c10d._allgather_base_": 2}), name
    assert results["classes-smoothing-plain"][2:] == (("R", "S(1)"), {"c10d._allgather_base_": 1})


def test_other_classes_are_exchanged_for_rows(results: dict[str, Any]) -> None:
    _, _, placements, sent = results["classes-of-all"]
    assert placements == ("P(sum)", "S(0)")
    # once forward, once backward; gloo has no all-to-all, so DTensor gathers and keeps its part
    assert sent in ({"c10d_functional.all_gather_into_tensor": 2}, {"c10d_functional.all_to_all_single": 2})


def test_scores_are_sharded_as_the_rows(results: dict[str, Any]) -> None:
    logits, target = example((5, 7))
    _, scores, softmax = bonus_cross_entropy_with_softmax(logits, target)
    for name in ("scores", "classes-scores"):
        for got, one in zip(results[name], (*scores, softmax), strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=1e-6, equal_nan=True)


def test_compiled_dtensor(results: dict[str, Any]) -> None:
    for got, truth in zip(results["compiled"], alone((6, 7), {}, torch.float64), strict=True):
        assert_within_budget(got, truth, None, what="compiled")


def test_errors_are_clear(results: dict[str, Any]) -> None:
    kind, message = results["mixed"]
    assert kind == "RuntimeError"
    assert "mixed torch.Tensor and DTensor" in message
    assert "Expected input to be a DTensor" in message and "got a plain tensor of shape [5, 1, 7]" in message
    kind, message = results["unregistered"]
    assert kind in ("NotImplementedError", "RuntimeError") and "bonus_ops.labels_forward" in message, message


def test_data_parallel_gradients_equal_one_process(results: dict[str, Any]) -> None:
    inputs, _ = example((8, 7))
    one = model().double()
    bonus_cross_entropy(one(inputs.double()), torch.arange(8) % 5, bonus=LogBonus()).backward()
    for got, parameter in zip(results["ddp"], one.parameters(), strict=True):
        # 2^-20: float32 sums of 8 products of inputs up to 8 against float64
        assert_within_budget(got, parameter.grad, None, floor=2.0**-20, what="DistributedDataParallel")


@pytest.mark.parametrize("name", ["fsdp", *(f"fsdp-{name}" for name in HEADS)])
def test_fully_sharded_gradients_equal_one_process(results: dict[str, Any], name: str) -> None:
    options = HEADS.get(name.removeprefix("fsdp-"))
    found = []
    for dtype in (torch.float32, torch.float64):
        one = Tokens(None if options is None else head_of(options)).to(dtype)
        for tokens, target in zip(TOKENS, NEXT, strict=True):
            if options is None:
                loss = bonus_cross_entropy(one(tokens).flatten(0, 1), target.flatten())
            else:
                loss = one(tokens, target)
            (loss.sum() / N_RANKS).backward()
        found.append([p.grad for p in one.parameters()])
    for i, (got, eager, truth) in enumerate(zip(results[name], *found, strict=True)):
        assert truth.abs().max() > 1e-2
        assert_within_budget(got, truth, eager, what=f"{name}: parameter {i}")


@pytest.mark.parametrize("how", ["", "-fsdp", "-linear", "-dtensor", "-sequence"])
@pytest.mark.parametrize("name", LAYERS)
def test_column_parallel_output_layers_equal_one_process(results: dict[str, Any], name: str, how: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        one = Tokens().to(dtype)
        loss = bonus_cross_entropy(one(TOKENS[0]).flatten(0, 1), NEXT[1].flatten(), **LAYERS[name])
        loss.sum().backward()
        found.append([loss.detach().flatten(), *(p.grad for p in one.parameters())])
    loss, grads = results[name + how]
    for i, (got, eager, truth) in enumerate(zip([loss.flatten(), *grads], *found, strict=True)):
        assert truth.abs().max() > 1e-2
        assert_within_budget(got, truth, eager, floor=2.0**-21, what=f"{name}{how}: {i}")


@pytest.mark.parametrize("how", ["dtensor", "sequence"])
def test_scores_of_a_layer_that_is_a_dtensor(results: dict[str, Any], how: str) -> None:
    one = Tokens()
    scores = linear_difficulty_scores(one.tok(TOKENS[0]), one.output.weight, NEXT[1])
    for got, same in zip(results[f"scores-{how}"], (*scores, *scores), strict=True):
        torch.testing.assert_close(got, same, rtol=0, atol=2e-6, equal_nan=True)


def test_faults_of_a_layer_that_is_a_dtensor_are_clear(results: dict[str, Any]) -> None:
    cut, bias, named = results["linear errors"]
    assert cut[0] == "NotImplementedError" and "placements (Shard(dim=1),)" in cut[1] and "Expected Shard(0)" in cut[1]
    assert bias == ("RuntimeError", "linear_bonus_cross_entropy: expected linear_bias to be a DTensor as linear_weight "
                    "is, got a plain tensor")  # fmt: skip
    assert named == ("NotImplementedError", "implementation='numba' does not run for a DTensor; None does")


if __name__ == "__main__":
    rank_main(int(sys.argv[2]), sys.argv[1])
else:
    from tests.budget import assert_within_budget
