"""The ways users call a loss: mixed precision, Hugging Face, timm, selective backprop, and a patch of F."""

import functools
import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy as copied_before
from torch.utils._python_dispatch import TorchDispatchMode

from bonus_ops import (
    BonusCrossEntropyLoss,
    LogBonus,
    PowerBonus,
    SoftmaxSquaredError,
    bonus_cross_entropy,
    difficulty_scores,
    patch_cross_entropy,
)
from bonus_ops.causal_lm import causal_lm_loss, causal_lm_loss_with_scores, trainer_loss
from tests.budget import assert_within_budget

# --- mixed precision --------------------------------------------------------------------------------------------------


def classifier(device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)


def clusters(n: int, device: str) -> tuple[Tensor, Tensor]:
    target = torch.arange(n, device=device) % 4
    return torch.randn(n, 8, device=device) + 3 * F.one_hot(target, 8), target


@pytest.mark.parametrize("bonus", [None, LogBonus(), LogBonus(log_end=1.0)], ids=str)
def test_training_with_autocast_and_gradient_scaler(device: str, bonus: Any) -> None:
    model = classifier(device)
    inputs, target = clusters(64, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(inputs)
            assert logits.dtype == torch.bfloat16
            loss = bonus_cross_entropy(logits, target, bonus=bonus)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(F.cross_entropy(logits.float(), target).item())
    assert scaler.get_scale() == 2.0**12, "no step was skipped"
    assert losses[-1] < 0.2 * losses[0], losses


def test_autocast_gradient_is_cross_entropys(device: str) -> None:
    logits = (4 * torch.randn(32, 10, device=device)).bfloat16()
    target = torch.arange(32, device=device) % 10

    def gradient(loss_fn: Any, dtype: torch.dtype) -> Tensor:
        leaf = logits.to(dtype).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_fn(leaf, target)
        (loss * 1024).backward()
        return leaf.grad

    truth = gradient(F.cross_entropy, torch.float64)
    ours = gradient(functools.partial(bonus_cross_entropy, bonus=None), torch.bfloat16)
    assert_within_budget(ours, truth, gradient(F.cross_entropy, torch.bfloat16), what="gradient under autocast")


def test_gradient_accumulation_equals_one_batch(device: str) -> None:
    inputs, target = clusters(32, device)
    whole, parts = classifier(device), classifier(device)
    parts.load_state_dict(whole.state_dict())
    bonus_cross_entropy(whole(inputs), target).backward()
    for x, y in zip(inputs.chunk(4), target.chunk(4), strict=True):
        (bonus_cross_entropy(parts(x), y) / 4).backward()
    for one, many in zip(whole.parameters(), parts.parameters(), strict=True):
        # 2^-20: sums over 32 rows in another order
        assert_within_budget(many.grad, one.grad.double(), None, floor=2.0**-20, what="accumulated gradient")


def test_a_scaler_saves_half_precision_gradients_from_underflow(device: str) -> None:
    n_rows, n_classes = 1024, 4
    logits = torch.zeros(n_rows, n_classes, device=device)
    logits[:, 0] = 8.0  # other classes: p = 3.4e-4, over 1024 rows 3e-7, and e^-4 less for the second half
    logits[n_rows // 2 :, 0] = 12.0
    target = torch.zeros(n_rows, dtype=torch.int64, device=device)
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, target).backward()

    def gradient(scale: float) -> Tensor:
        half = logits.half().requires_grad_()
        with torch.autocast(device, dtype=torch.float16):
            loss = bonus_cross_entropy(half, target, bonus=None)
        torch.amp.GradScaler(device, init_scale=scale).scale(loss).backward()
        return half.grad

    assert (gradient(1.0)[n_rows // 2 :] == 0).all(), "without a scale these underflow"
    scaled = gradient(2.0**16)
    assert scaled.dtype == torch.float16
    # one rounding to float16; nothing else is allowed, so the slack is relative
    assert_within_budget(scaled.double() / 2**16, exact.grad, None, floor=2.0**-10, unit=0.0, what="scaled gradient")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 11, (2, 6))
    labels[0, 3:] = -100  # padding
    return (3 * torch.randn(2, 6, 11)).to(dtype), labels


def plain_causal_lm_loss(
    logits: Tensor, labels: Tensor, n_items: Any = None, shifted: bool = False, **options: Any
) -> Tensor:
    """Compute it as a textbook does: slice, flatten, copy to at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    reduction = "mean" if n_items is None else "sum"
    loss = F.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1), reduction=reduction, **options)
    return loss if n_items is None else loss / float(n_items)


def loss_and_gradient(loss_fn: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = loss_fn(leaf, *args, **kwargs)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_items", [None, 13, torch.tensor(13)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("shifted", [False, True], ids=["shift", "shift_labels"])
def test_causal_lm_loss_without_bonus_is_the_plain_one(dtype: torch.dtype, n_items: Any, shifted: bool) -> None:
    logits, labels = tokens(dtype)
    given: dict[str, Any] = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    loss, grad = loss_and_gradient(
        causal_lm_loss, logits, vocab_size=11, num_items_in_batch=n_items, bonus=None, **given, position_ids=None
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert grad.dtype == dtype
    eager = loss_and_gradient(plain_causal_lm_loss, logits, labels, n_items, shifted)
    truth = loss_and_gradient(plain_causal_lm_loss, logits.double(), labels, n_items, shifted)
    assert_within_budget(loss, truth[0], eager[0], what="loss")
    assert_within_budget(grad, truth[1], eager[1], what="gradient")


def test_causal_lm_loss_has_the_bonus_of_cross_entropy() -> None:
    logits, labels = tokens()
    options: dict[str, Any] = {"bonus": PowerBonus(gamma=2.0), "label_smoothing": 0.1}
    expected = bonus_cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), **options)
    torch.testing.assert_close(causal_lm_loss(logits, labels, 11, **options), expected)


def test_causal_lm_loss_equals_transformers() -> None:
    theirs = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    ours = list(inspect.signature(causal_lm_loss).parameters)
    names = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert ours[: len(names)] == names
    logits, labels = tokens(torch.bfloat16)
    for n_items in (None, 13, torch.tensor(13)):
        got = loss_and_gradient(causal_lm_loss, logits, labels, 11, n_items, bonus=None)
        for mine, other in zip(got, loss_and_gradient(theirs, logits, labels, 11, n_items), strict=True):
            torch.testing.assert_close(mine, other)


def test_causal_lm_loss_inside_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    _, labels = tokens()
    inputs = {"input_ids": labels.clamp(min=0), "labels": labels}
    theirs = model(**inputs).loss, model(**inputs, num_items_in_batch=torch.tensor(13)).loss
    model.loss_function = functools.partial(causal_lm_loss, bonus=None)
    ours = model(**inputs).loss, model(**inputs, num_items_in_batch=torch.tensor(13)).loss
    torch.testing.assert_close(ours, theirs)


class LargeResults(TorchDispatchMode):
    """Keeps the new storages that hold at least as many bytes as ``logits``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.n_bytes, self.known = logits.numel() * logits.element_size(), {logits.untyped_storage().data_ptr()}
        self.storages: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= self.n_bytes:
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.storages.append(storage)  # alive, so that its address is not used again
        return out


@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
def test_causal_lm_loss_makes_no_copy_of_half_precision_logits(sliced: bool) -> None:
    whole = torch.randn(2, 65, 8192).bfloat16()
    logits = whole[:, :-1] if sliced else whole[:, :-1].contiguous()
    labels = torch.randint(0, 8192, (2, 64))

    def large_results(loss_fn: Any) -> list[int]:
        leaf = logits.detach().requires_grad_()
        with LargeResults(leaf) as mode:
            loss_fn(leaf, labels).backward()
        return [storage.nbytes() for storage in mode.storages]

    n_bytes = 2 * logits.numel()
    copying = large_results(lambda z, y: F.cross_entropy(z.float().transpose(1, 2), y))
    assert copying[0] == 2 * n_bytes, "the probe sees a float32 copy"
    assert large_results(functools.partial(causal_lm_loss, vocab_size=8192)) == [n_bytes], "the gradient, nothing else"


def test_scores_of_tokens() -> None:
    logits, labels = tokens()
    loss, scores = causal_lm_loss_with_scores(logits, labels, vocab_size=11, num_items_in_batch=7)
    torch.testing.assert_close(loss, causal_lm_loss(logits, labels, vocab_size=11, num_items_in_batch=7))
    expected = difficulty_scores(logits[:, :-1].transpose(1, 2), labels[:, 1:])
    for column, one in zip(scores, expected, strict=True):
        assert column.shape == labels.shape
        torch.testing.assert_close(column[:, :-1], one, equal_nan=True)
    assert scores.el2n[:, -1].isnan().all()
    sliced = causal_lm_loss_with_scores(logits[:, 1:], None, shift_labels=labels[:, 1:])[1]
    assert sliced.el2n.shape == (2, 5)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"labels": torch.zeros(2, 6, dtype=torch.int64), "vocab_size": 12}, r"vocab_size = 12.*\[2, 6, 11\]"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"shape \[2, 6\].*got \[2, 5\]"),
        ({"labels": None}, "labels or shift_labels"),
    ],
)
def test_causal_lm_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(torch.zeros(2, 6, 11), **given)


def test_causal_lm_loss_passes_on_every_option_of_cross_entropy() -> None:
    logits, labels = tokens()
    rows, targets = logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    plain = causal_lm_loss(logits, labels)
    given: list[dict[str, Any]] = [
        {"bonus_smoothing": 0.3},
        {"bonus_weight": torch.linspace(0.5, 1.5, 11)},
        {"weight": torch.linspace(0.5, 2.0, 11)},
        {"bonus": SoftmaxSquaredError()},
    ]
    for options in given:
        expected = bonus_cross_entropy(rows, targets, **options)
        assert not torch.isclose(expected, plain), "the option counts"
        torch.testing.assert_close(causal_lm_loss(logits, labels, **options), expected)
        torch.testing.assert_close(trainer_loss({"logits": logits}, labels, **options), expected)
        torch.testing.assert_close(causal_lm_loss_with_scores(logits, labels, **options)[0], expected)
        expected = bonus_cross_entropy(rows, targets, reduction="sum", **options) / 7
        torch.testing.assert_close(trainer_loss({"logits": logits}, labels, 7, **options), expected)
    with pytest.raises(TypeError, match="validate must be"):
        causal_lm_loss(logits, labels, validate=1)


def test_options_that_would_be_lost_raise() -> None:
    logits, labels = tokens()
    for loss_fn in (causal_lm_loss, causal_lm_loss_with_scores, functools.partial(trainer_loss)):
        outputs: Any = {"logits": logits} if isinstance(loss_fn, functools.partial) else logits
        for name in ("reduction", "reduce", "size_average"):
            with pytest.raises(TypeError, match=f"unexpected option '{name}'"):
                loss_fn(outputs, labels, **{name: "sum"})
    for name in ("bonous", "position_ids", "shift_labels"):
        with pytest.raises(TypeError, match=f"trainer_loss.. got an unexpected option '{name}'"):
            trainer_loss({"logits": logits}, labels, **{name: None})
    assert causal_lm_loss(logits, labels, position_ids=None, use_cache=False) == causal_lm_loss(logits, labels)


@pytest.mark.parametrize("loss_fn", [causal_lm_loss, causal_lm_loss_with_scores])
def test_causal_lm_loss_wants_tensors(loss_fn: Any) -> None:
    logits, labels = tokens()
    with pytest.raises(TypeError, match=r"argument 'logits' \(position 1\) must be Tensor, not numpy.ndarray"):
        loss_fn(logits.numpy(), labels)
    with pytest.raises(TypeError, match=r"argument 'labels' \(position 2\) must be Tensor, not list"):
        loss_fn(logits, labels.tolist())
    with pytest.raises(TypeError, match="argument 'shift_labels' must be Tensor, not list"):
        loss_fn(logits, None, shift_labels=labels.tolist())
    with pytest.raises(ValueError, match=r"expected logits \[..., V\], got shape \[\]"):
        loss_fn(logits.sum(), labels)


def test_trainer_loss_says_that_the_logits_come_first() -> None:
    logits, labels = tokens()
    with pytest.raises(ValueError, match=r"first member is the logits \[..., V\], got a scalar"):
        trainer_loss((logits.sum(), logits), labels)
    with pytest.raises(TypeError, match="expected outputs with logits, or a tuple that begins with them, got Tensor"):
        trainer_loss(logits, labels)
    with pytest.raises(ValueError, match="expected outputs with the key 'logits', got the keys 'loss', 'logit'"):
        trainer_loss({"loss": logits.sum(), "logit": logits}, labels)
    with pytest.raises(ValueError, match="begins with the logits, got an empty one"):
        trainer_loss((), labels)
    with pytest.raises(TypeError, match="argument 'ignore_index' .* must be int, not str"):
        trainer_loss((logits,), labels, ignore_index="pad")
    with pytest.raises(TypeError, match="num_items_in_batch must be a number or a Tensor, got str"):
        trainer_loss((logits,), labels, "7")


class Outputs(dict):  # what a model returns: a dict whose keys are attributes
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("n_items", [13, torch.tensor(13)], ids=["int", "tensor"])
@pytest.mark.parametrize(
    "wrap", [lambda z: Outputs(logits=z), lambda z: types.SimpleNamespace(logits=z), lambda z: (z, None)],
    ids=["dict", "attribute", "tuple"],
)  # fmt: skip
def test_trainers_compute_loss_func(n_items: Any, wrap: Any) -> None:
    logits, labels = tokens()
    compute_loss_func = functools.partial(trainer_loss, bonus=None)
    loss = compute_loss_func(wrap(logits), labels, num_items_in_batch=n_items)
    torch.testing.assert_close(loss, plain_causal_lm_loss(logits, labels, n_items))
    loss = compute_loss_func(wrap(logits), labels, num_items_in_batch=n_items, shift=False)
    torch.testing.assert_close(loss, plain_causal_lm_loss(logits, labels, n_items, shifted=True))


def test_trainers_accumulation_counts_all_tokens() -> None:
    logits, labels = tokens()
    n_items = (labels[:, 1:] != -100).sum()
    assert n_items == 2 + 5, "the steps differ in their tokens, so a mean of means would be wrong"
    steps = [trainer_loss({"logits": z}, y, n_items) for z, y in zip(logits.split(1), labels.split(1), strict=True)]
    torch.testing.assert_close(sum(steps), trainer_loss({"logits": logits}, labels))


@pytest.mark.parametrize("n_items", [None, 13], ids=["mean", "int"])
def test_a_trainer_may_scale_the_loss_in_place(n_items: Any) -> None:
    logits, labels = tokens()

    def scaled(leaf: Tensor) -> Tensor:
        loss = trainer_loss((leaf,), labels, n_items)
        loss *= 4  # average_tokens_across_devices
        return loss

    _, grad = loss_and_gradient(scaled, logits)
    torch.testing.assert_close(grad, 4 * loss_and_gradient(causal_lm_loss, logits, labels, 11, n_items)[1])


def test_trainer_loss_classifies() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    torch.testing.assert_close(trainer_loss((logits,), labels, shift=False), bonus_cross_entropy(logits, labels))


# --- timm -------------------------------------------------------------------------------------------------------------


def mixup_targets(target: Tensor, n_classes: int, lam: float, smoothing: float) -> Tensor:
    """Mix the smoothed one-hot rows of a batch with those of the batch reversed."""
    rows = F.one_hot(target, n_classes) * (1.0 - smoothing) + smoothing / n_classes
    return lam * rows + (1 - lam) * rows.flip(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_timms_train_loss(dtype: torch.dtype) -> None:
    output, hard = (3 * torch.randn(6, 5)).to(dtype), torch.arange(6) % 5
    soft = mixup_targets(hard, 5, 0.3, 0.1)
    log_probs = output.double().log_softmax(1)
    smoothed = -(0.9 * log_probs.gather(1, hard[:, None])[:, 0] + 0.1 * log_probs.mean(1)).mean()
    for train_loss_fn, target, truth in (
        (BonusCrossEntropyLoss(bonus=None), hard, -log_probs.gather(1, hard[:, None]).mean()),
        (BonusCrossEntropyLoss(bonus=None, label_smoothing=0.1), hard, smoothed),
        (BonusCrossEntropyLoss(bonus=None), soft, -(soft.double() * log_probs).sum(1).mean()),
    ):
        leaf = output.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = train_loss_fn(leaf, target)
        loss.backward()
        assert loss.dtype == torch.float32
        assert_within_budget(loss, truth, None, what="timm loss")
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_timms_own_losses() -> None:
    losses = pytest.importorskip("timm.loss")
    output, hard = torch.randn(6, 5), torch.arange(6) % 5
    soft = mixup_targets(hard, 5, 0.3, 0.1)
    smoothed = BonusCrossEntropyLoss(bonus=None, label_smoothing=0.1)(output, hard)
    torch.testing.assert_close(smoothed, losses.LabelSmoothingCrossEntropy(0.1)(output, hard))
    torch.testing.assert_close(
        BonusCrossEntropyLoss(bonus=None)(output, soft), losses.SoftTargetCrossEntropy()(output, soft)
    )


def test_mixup_with_a_bonus_trains() -> None:
    model = classifier("cpu")
    inputs, target = clusters(64, "cpu")
    soft = mixup_targets(target, 4, 0.8, 0.1)
    mixed = 0.8 * inputs + 0.2 * inputs.flip(0)
    train_loss_fn = BonusCrossEntropyLoss(bonus=LogBonus())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = train_loss_fn(model(mixed), soft)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


# --- selective backprop -----------------------------------------------------------------------------------------------


def select_hardest(output: Tensor, target: Tensor, loss_fun: Any, keep: float) -> Tensor:
    """Return the indices of the rows with the largest losses, as Composer's algorithm asks a loss for them."""
    if "reduction" not in inspect.signature(loss_fun).parameters:
        raise TypeError("loss_fun must take the keyword argument reduction")
    losses = loss_fun(output, target, reduction="none")
    return losses.argsort(descending=True)[: int(keep * len(losses))]


@pytest.mark.parametrize(
    "loss_fun",
    [
        bonus_cross_entropy,
        functools.partial(bonus_cross_entropy, bonus=None),
        functools.partial(bonus_cross_entropy, bonus=LogBonus(log_end=0.5)),
    ],
    ids=["default", "plain", "partial"],
)
def test_selective_backprop(loss_fun: Any) -> None:
    output, target = 3 * torch.randn(16, 5), torch.arange(16) % 5
    # a bonus falls with the gap as cross-entropy does, so it keeps the order
    expected = select_hardest(output, target, F.cross_entropy, keep=0.5)
    assert select_hardest(output, target, loss_fun, keep=0.5).tolist() == expected.tolist()


def test_composers_selective_backprop() -> None:
    composer = pytest.importorskip("composer.algorithms.selective_backprop")
    inputs, target = clusters(16, "cpu")
    kept, labels = composer.select_using_loss(inputs, target, classifier("cpu"), bonus_cross_entropy, keep=0.5)
    assert len(kept) == len(labels) == 8


# --- patch ------------------------------------------------------------------------------------------------------------

LOGITS, LABELS = torch.tensor([[2.0, 0.0, 1.0], [0.5, 3.0, 0.0]]), torch.tensor([0, 1])


def with_bonus(bonus: Any) -> Tensor:
    return bonus_cross_entropy(LOGITS, LABELS, bonus=bonus)


def assert_restored() -> None:
    assert F.cross_entropy is copied_before


def test_patch_reaches_the_function_and_the_module_and_restores() -> None:
    assert_restored()  # importing bonus_ops has patched nothing
    plain = copied_before(LOGITS, LABELS)
    module = nn.CrossEntropyLoss()
    with patch_cross_entropy(bonus=LogBonus(log_end=0.5)):
        expected = with_bonus(LogBonus(log_end=0.5))
        assert expected != plain
        assert F.cross_entropy(LOGITS, LABELS) == expected
        assert F.cross_entropy(input=LOGITS, target=LABELS, reduction="mean") == expected
        assert module(LOGITS, LABELS) == expected
        assert nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)(LOGITS, LABELS).shape == (2,)
        assert copied_before(LOGITS, LABELS) == plain, "a copy made before is out of reach"
        assert inspect.signature(F.cross_entropy) == inspect.signature(copied_before)
    assert_restored()
    assert module(LOGITS, LABELS) == plain


def test_patch_restores_after_an_exception() -> None:
    with pytest.raises(KeyError), patch_cross_entropy():
        raise KeyError
    assert_restored()
    with pytest.raises(IndexError, match="Target 7 is out of bounds"), patch_cross_entropy():
        F.cross_entropy(LOGITS, torch.tensor([0, 7]))
    assert_restored()
    with patch_cross_entropy(), pytest.raises(ValueError, match="Expected input batch_size"):
        F.cross_entropy(LOGITS, torch.tensor([0]))  # torch's words come from torch, not from the patch
    assert_restored()


def test_patches_nest_and_re_enter() -> None:
    outer, inner = patch_cross_entropy(bonus=LogBonus()), patch_cross_entropy(bonus=PowerBonus())
    with outer:
        with inner:
            assert F.cross_entropy(LOGITS, LABELS) == with_bonus(PowerBonus())
            with outer:
                assert F.cross_entropy(LOGITS, LABELS) == with_bonus(LogBonus())
            assert F.cross_entropy(LOGITS, LABELS) == with_bonus(PowerBonus())
        assert F.cross_entropy(LOGITS, LABELS) == with_bonus(LogBonus())
    assert_restored()
    with outer:
        assert F.cross_entropy(LOGITS, LABELS) == with_bonus(LogBonus())
    assert_restored()


def test_patch_as_a_decorator() -> None:
    @patch_cross_entropy(bonus=LogBonus(log_end=1.0))
    def train(depth: int) -> Tensor:
        return train(depth - 1) if depth else F.cross_entropy(LOGITS, LABELS)

    assert_restored()
    assert train(2) == with_bonus(LogBonus(log_end=1.0))
    assert_restored()


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"bonus": 0.75}, TypeError, "GapLoss instance"),
        ({"bonus": LogBonus}, TypeError, "the class LogBonus"),
        ({"reduction": "sum"}, TypeError, "unexpected option 'reduction'"),
        ({"log_end": 0.5}, TypeError, "unexpected option 'log_end'"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
    ],
)
def test_patch_refuses_bad_options_before_patching(options: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        patch_cross_entropy(**options)
    assert_restored()


def test_patch_says_that_the_bonus_is_by_keyword() -> None:
    with pytest.raises(TypeError, match=r"no positional argument, got LogBonus.\nExpected .* bonus=LogBonus\(\)"):
        patch_cross_entropy(LogBonus())
    with pytest.raises(TypeError, match=r"got function.\n.*as a decorator, @patch_cross_entropy\(\)"):
        patch_cross_entropy(with_bonus)
    assert_restored()


def test_patch_says_what_it_is() -> None:
    assert repr(patch_cross_entropy(bonus=None, validate=True)) == "patch_cross_entropy(bonus=None, validate=True)"


def test_patch_takes_options_that_need_another_device() -> None:
    patch_cross_entropy(implementation="triton")  # only a call knows where its tensors are
    with patch_cross_entropy(implementation="reference", validate=True):
        torch.testing.assert_close(F.cross_entropy(LOGITS, LABELS), with_bonus(LogBonus()))


def test_compiled_code_sees_the_patch() -> None:
    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    plain = copied_before(LOGITS, LABELS)
    torch.testing.assert_close(loss(LOGITS, LABELS), plain)
    with patch_cross_entropy():
        torch.testing.assert_close(loss(LOGITS, LABELS), with_bonus(LogBonus()))
    torch.testing.assert_close(loss(LOGITS, LABELS), plain)
