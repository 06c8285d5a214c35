"""What a patch or a model's loss would drop without a word: scripted code, misspelt options, an exit out of turn."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bonus_ops import LogBonus, bonus_cross_entropy, patch_cross_entropy
from bonus_ops.causal_lm import causal_lm_loss, causal_lm_loss_with_scores, trainer_loss

LOGITS, LABELS = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)), torch.arange(12).view(2, 6) % 11
OF_TRANSFORMERS = (
    "output_hidden_states", "output_attentions", "output_router_logits", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k", "position_ids", "is_causal", "seq_idx", "use_cache", "return_dict",
    "cache_position", "attention_mask", "logits_to_keep", "past_key_values",
)  # fmt: skip


@pytest.mark.parametrize("loss_fn", [causal_lm_loss, causal_lm_loss_with_scores])
@pytest.mark.parametrize("name", [n for n, p in inspect.signature(causal_lm_loss).parameters.items()
                                  if p.kind is not p.VAR_KEYWORD and len(n) > 5])  # fmt: skip
def test_a_misspelt_option_raises_and_says_what_was_meant(loss_fn, name):
    for misspelt in (name[:2] + name[3] + name[2] + name[4:], name + "s", name[:-1], name.replace("_", "__"), name[1:]):
        if misspelt in inspect.signature(causal_lm_loss).parameters:
            continue
        with pytest.raises(TypeError, match=f"unexpected option '{misspelt}'. Did you mean '"):
            loss_fn(LOGITS, LABELS, **{misspelt: None})


@pytest.mark.parametrize("name", ["log_end", "strength", "clamp"])
def test_a_field_of_the_loss_raises(name):
    with pytest.raises(
        TypeError, match=rf"unexpected option '{name}'. It goes into the loss: bonus=LogBonus\({name}=..."
    ):
        functools.partial(causal_lm_loss, **{name: 0.5})(LOGITS, LABELS)


def test_what_models_hand_their_loss_is_still_ignored():
    given = dict.fromkeys(OF_TRANSFORMERS)
    assert causal_lm_loss(LOGITS, LABELS, **given) == causal_lm_loss(LOGITS, LABELS)
    kwargs = pytest.importorskip("transformers.utils.generic").TransformersKwargs.__annotations__
    others = {name: None for name in kwargs if name != "num_items_in_batch"}
    assert causal_lm_loss(LOGITS, LABELS, **others) == causal_lm_loss(LOGITS, LABELS)


def test_the_compiler_takes_what_models_hand_their_loss():
    def loss(logits, labels):
        return causal_lm_loss(logits, labels, position_ids=None, implementation="reference")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LOGITS, LABELS), loss(LOGITS, LABELS))


def test_the_traps_of_a_trainer_stand_where_the_recipe_stands():
    text = " ".join(inspect.getmodule(trainer_loss).__doc__.split())
    assert "label_smoothing_factor" in text and "never ask for their ``loss_function``" in text


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"label_smoothing": 0.1},
                                     {"weight": torch.arange(11.0)}, {"reduction": "sum"}], ids=str)  # fmt: skip
def test_a_module_scripted_in_the_patch_has_its_bonus(options):
    logits, target = LOGITS.view(-1, 11), LABELS.view(-1)
    with patch_cross_entropy(bonus=LogBonus(0.5)):
        scripted = torch.jit.script(nn.CrossEntropyLoss(**options))
        inside = scripted(logits, target)
    expected = bonus_cross_entropy(logits, target, bonus=LogBonus(0.5), **options)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(scripted(logits, target), expected)
    plain = torch.jit.script(nn.CrossEntropyLoss(**options))(logits, target)
    torch.testing.assert_close(plain, F.cross_entropy(logits, target, **options))


def test_a_function_scripted_in_the_patch_has_its_bonus():
    with patch_cross_entropy(), patch_cross_entropy(bonus=LogBonus(0.25)):

        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(logits, target, reduction="sum") * 2

        loss.__annotations__ = {"logits": torch.Tensor, "target": torch.Tensor, "return": torch.Tensor}
        scripted = torch.jit.script(loss)
    logits = LOGITS.view(-1, 11).clone().requires_grad_()
    value = scripted(logits, LABELS.view(-1))
    expected = 2 * bonus_cross_entropy(logits, LABELS.view(-1), reduction="sum", bonus=LogBonus(0.25))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))


def test_a_patch_left_without_having_been_entered_says_so():
    before = F.cross_entropy
    patch = patch_cross_entropy()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="left without having been entered"):
            patch.__exit__(None, None, None)
        with patch:
            assert F.cross_entropy is not before
        assert F.cross_entropy is before
