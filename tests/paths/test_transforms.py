"""Function transforms: every one of `torch.func`, and forward mode, gives what plain torch gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from bonus_ops import (
    CosineBonus,
    Focal,
    LogBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop:UserWarning")  # vmap's loop over samples

Loss = Callable[[Tensor, Tensor], Tensor]
LOGITS = torch.linspace(-2, 3, 12, dtype=torch.float64).view(4, 3)[:, [2, 0, 1]].contiguous()
TARGET = torch.tensor([0, -100, 2, 1])
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
DIRECTION = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
LOGITS_3 = torch.stack([LOGITS, 2 * LOGITS, -LOGITS])
TARGET_3 = torch.stack([TARGET, TARGET.roll(1), TARGET])


def total(loss: Loss) -> Loss:
    return lambda z, y=TARGET: loss(z, y).sum()


def dual(loss: Loss, logits: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, DIRECTION), TARGET)).tangent.detach()


def upstreams(loss: Loss, how: Callable) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, TARGET)
    rng = torch.Generator().manual_seed(0)
    return how(value, logits, torch.randn(5, *value.shape, dtype=value.dtype, generator=rng))


TRANSFORMS: dict[str, Callable[[Loss], object]] = {
    "grad": lambda loss: grad(total(loss))(LOGITS),
    "grad and value": lambda loss: grad_and_value(total(loss))(LOGITS),
    "vjp": lambda loss: vjp(total(loss), LOGITS)[1](torch.tensor(3.0, dtype=torch.float64)),
    "jvp": lambda loss: jvp(lambda z: loss(z, TARGET), (LOGITS,), (DIRECTION,)),
    "dual numbers": lambda loss: dual(loss, LOGITS),
    "dual numbers that require a gradient": lambda loss: dual(loss, LOGITS.clone().requires_grad_()),
    "vmap over logits": lambda loss: vmap(lambda z: loss(z, TARGET))(LOGITS_3),
    "vmap over a last dimension": lambda loss: vmap(lambda z: loss(z, TARGET), in_dims=2)(LOGITS_3.movedim(0, 2)),
    "vmap over labels": lambda loss: vmap(lambda y: loss(LOGITS, y))(TARGET_3),
    "vmap over both": lambda loss: vmap(loss)(LOGITS_3, TARGET_3),
    "vmap over rows": lambda loss: vmap(loss)(LOGITS, TARGET),
    "vmap of vmap": lambda loss: vmap(vmap(lambda z: loss(z, TARGET)))(torch.stack([LOGITS_3, LOGITS_3 + 1])),
    "vmap in chunks": lambda loss: vmap(lambda z: loss(z, TARGET), chunk_size=2)(LOGITS_3),
    "vmap of grad": lambda loss: vmap(grad(total(loss)))(LOGITS_3, TARGET_3),
    "grad of vmap": lambda loss: grad(lambda z: vmap(loss)(z, TARGET_3).sum())(LOGITS_3),
    "gradients per example": lambda loss: vmap(
        grad(lambda w, x, y: loss((x @ w)[None], y[None]).sum()), in_dims=(None, 0, 0)
    )(DIRECTION[:3], LOGITS[[0, 2]], TARGET[[0, 2]]),
    "vmap of jvp": lambda loss: vmap(lambda v: jvp(lambda z: loss(z, TARGET), (LOGITS,), (v,)))(LOGITS_3),
    "jvp of vmap": lambda loss: jvp(lambda z: vmap(loss)(z, TARGET_3), (LOGITS_3,), (LOGITS_3.square(),)),
    "jacfwd": lambda loss: jacfwd(lambda z: loss(z, TARGET))(LOGITS),
    "jacrev": lambda loss: jacrev(lambda z: loss(z, TARGET))(LOGITS),
    "hessian": lambda loss: hessian(total(loss))(LOGITS),
    "reverse over reverse": lambda loss: jacrev(jacrev(total(loss)))(LOGITS),
    "reverse over forward": lambda loss: jacrev(jacfwd(total(loss)))(LOGITS),
    "forward over forward": lambda loss: jacfwd(jacfwd(total(loss)))(LOGITS),
    "third derivative": lambda loss: grad(lambda z: hessian(total(loss))(z).square().sum())(LOGITS),
    "batched upstream gradients": lambda loss: upstreams(
        loss, lambda value, z, v: torch.autograd.grad(value, z, v, is_grads_batched=True)[0]
    ),
    "vmap of autograd.grad": lambda loss: upstreams(
        loss, lambda value, z, v: vmap(lambda v: torch.autograd.grad(value, z, v, retain_graph=True)[0])(v)
    ),
    "vectorized jacobian": lambda loss: torch.autograd.functional.jacobian(
        lambda z: loss(z, TARGET), LOGITS, vectorize=True
    ),
}


FEW = ("grad", "jvp", "vmap over both", "vmap of grad", "jacrev", "batched upstream gradients")


@pytest.mark.parametrize(
    ("implementation", "transform"),
    [("numba", name) for name in TRANSFORMS] + [(how, name) for how in ("triton", "reference") for name in FEW],
)
def test_a_transform_gives_what_torch_gives(transform, implementation, request):
    """Against cross-entropy without a bonus, against autograd of the specification with one."""
    if implementation == "triton" and request.getfixturevalue("kernel_device") != "cpu":
        pytest.skip("the same code on another device")
    for reduction, weight in (("none", None), ("mean", WEIGHT)):
        if implementation == "numba" or reduction == "mean":
            options = {"weight": weight, "reduction": reduction}

            def plain(z, y, options=options):
                return F.cross_entropy(z, y, **options)

            def ours(z, y, bonus=None, implementation=implementation, options=options):
                return bonus_cross_entropy(z, y, bonus=bonus, implementation=implementation, **options)

            apply = TRANSFORMS[transform]
            torch.testing.assert_close(apply(ours), apply(plain), rtol=1e-10, atol=1e-12, equal_nan=True)
            if implementation != "reference":
                bonus = LogBonus(0.6, strength=0.8)
                truth = apply(lambda z, y: ours(z, y, bonus, "reference"))  # noqa: B023
                actual = apply(lambda z, y: ours(z, y, bonus))  # noqa: B023
                torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_linearized_loss_is_its_tangent(reduction):
    def loss(z):
        return bonus_cross_entropy(z, TARGET, reduction=reduction)

    value, linear = linearize(loss, LOGITS)
    torch.testing.assert_close((value, linear(DIRECTION)), jvp(loss, (LOGITS,), (DIRECTION,)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "bonus", "reduction"),
    [
        ("numba", LogBonus(), "none"),
        ("numba", CosineBonus(start=0.2), "mean"),
        ("numba", Focal(), "none"),
        ("triton", LogBonus(), "none"),
    ],
    ids=repr,
)
def test_every_mode_agrees_with_finite_differences(implementation, bonus, reduction, request):
    place = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    logits, target = LOGITS[:2].clone().to(place).requires_grad_(), TARGET[[0, 2]].to(place)
    weight = WEIGHT.to(place)

    def loss(z: Tensor) -> Tensor:
        return bonus_cross_entropy(z, target, weight, reduction=reduction, bonus=bonus, implementation=implementation)

    fast = implementation == "triton"  # a few directions instead of all
    batched = {"check_batched_grad": not fast, "check_batched_forward_grad": not fast}
    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True, fast_mode=fast, **batched)
    if implementation != "triton":  # a second derivative is the formula's, see `test_autograd`
        assert torch.autograd.gradgradcheck(loss, logits, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("implementation", "in_dims"),
    [("numba", dims) for dims in ((0, 0), (0, None), (None, 0), (2, 1), (-1, -1))]
    + [("triton", (2, 1)), ("reference", (2, 1))],
)
def test_scores_and_probabilities_come_out_batched(implementation, in_dims, request):
    if implementation == "triton" and request.getfixturevalue("kernel_device") != "cpu":
        pytest.skip("the same code on another device")
    logits, target = LOGITS_3.float(), TARGET_3
    if implementation == "triton":
        logits, target = logits[:2], target[:2]
    if in_dims[0] is None:
        logits = logits[:1].expand_as(logits)
    if in_dims[1] is None:
        target = target[:1].expand_as(target)
    call = {"reduction": "none", "implementation": implementation}

    def everything(z, y):
        loss, scores, probabilities = bonus_cross_entropy_with_softmax(z, y, **call)
        return loss, *scores, probabilities, bonus_cross_entropy_with_scores(z, y, **call)[1].el2n

    def only(z, y):
        return tuple(difficulty_scores(z, y, implementation=implementation))

    given = [
        x[0] if d is None else x.movedim(0, d).contiguous() for x, d in zip((logits, target), in_dims, strict=True)
    ]
    for function in (everything, only):
        expected = [torch.stack(x) for x in zip(*map(function, logits, target), strict=True)]
        actual = vmap(function, in_dims=in_dims)(*given)
        torch.testing.assert_close(list(actual), expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("implementation", ["numba", "reference"])
def test_other_shapes_map_too(implementation):
    """No batch dimension, a spatial one, none at all."""
    for shape in ((3,), (2, 3, 5), (0, 3)):
        logits = torch.randn(4, *shape)
        target = torch.randint(0, 3, (4, *shape[:1], *shape[2:]) if len(shape) > 1 else (4,))

        def loss(z, y, function=F.cross_entropy, **options):
            return function(z, y, reduction="sum", **options)

        def ours(z, y):
            return loss(z, y, bonus_cross_entropy, bonus=None, implementation=implementation)

        torch.testing.assert_close(vmap(ours)(logits, target), vmap(loss)(logits, target))
        torch.testing.assert_close(vmap(grad(ours))(logits, target), vmap(grad(loss))(logits, target))


@pytest.mark.parametrize("implementation", ["numba", "reference"])
def test_a_bad_label_under_vmap_raises(implementation):
    target = TARGET_3.clone()
    target[2, 3] = 3
    for function in (bonus_cross_entropy, grad(bonus_cross_entropy)):
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            vmap(lambda z, y, f=function: f(z, y, implementation=implementation))(LOGITS_3, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tangent_has_the_dtype_of_the_loss(dtype):
    logits = LOGITS.to(dtype)
    value, tangent = jvp(lambda z: bonus_cross_entropy(z, TARGET, bonus=None), (logits,), (DIRECTION.to(dtype),))
    truth = jvp(lambda z: F.cross_entropy(z, TARGET), (logits.double(),), (DIRECTION.to(dtype).double(),))
    assert value.dtype == tangent.dtype == dtype
    # half an ulp for the final rounding, as much again for what float32 loses
    torch.testing.assert_close((value.double(), tangent.double()), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_per_example_of_a_model():
    """The recipe of torch's tutorial: vmap(grad) over functional_call."""
    model = torch.nn.Linear(5, 3)
    x, target = torch.randn(4, 5), TARGET

    def gradients(loss):
        def of_one(parameters, x, y):
            return loss(functional_call(model, parameters, (x[None],)), y[None])

        return vmap(grad(of_one), in_dims=(None, 0, 0))(dict(model.named_parameters()), x, target)

    ours = gradients(lambda z, y: bonus_cross_entropy(z, y, bonus=None, reduction="sum"))
    torch.testing.assert_close(ours, gradients(lambda z, y: F.cross_entropy(z, y, reduction="sum")))
