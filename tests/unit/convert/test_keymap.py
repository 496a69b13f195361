"""The key map: exact both ways, complete both ways, and its layouts against arithmetic written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from tests.parity.pairs import CASES
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED, VOCAB_SIZE
from train.convert.families.llama import LLAMA as LLAMA_FAMILY
from train.convert.keymap import KeyMap
from train.model.cost import parameter_shapes

MODELS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tied_head=False),
    "llama": LLAMA,
    "llama-tied-biases": LLAMA_STRETCHED,
    "llama-one-kv-head": replace(LLAMA, num_kv_heads=1, num_heads=8, head_size=4, num_layers=11),
    **{name: replace(model, vocab_size=VOCAB_SIZE) for name, model in CASES.items() if model.family not in ("gpt2", "llama")},
}


def _numbered(shape):
    """A tensor whose every element is different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("case", MODELS)
def test_there_and_back_is_the_same_to_the_bit(case):
    keymap = KeyMap(MODELS[case])
    produced = {}
    for name, shape in parameter_shapes(MODELS[case]).items():
        parts = keymap.to_foreign(name, _numbered(shape))
        assert not produced.keys() & parts.keys()
        produced |= parts
        back = keymap.to_logical(name, parts.__getitem__)
        rows = VOCAB_SIZE if name in ("embedding.tokens.weight", "head.weight") else shape[0]
        assert tuple(back.shape) == shape
        assert torch.equal(back[:rows], _numbered(shape)[:rows])
        assert not back[rows:].any()  # padding
    assert {key: tuple(part.shape) for key, part in produced.items()} == keymap.foreign_shapes
    keymap.check_foreign(keymap.foreign_shapes)
    keymap.check_logical(parameter_shapes(MODELS[case]))


def test_llama_rows_by_hand():
    keymap = KeyMap(LLAMA)  # 4 query heads, 2 key-value heads, of size 16
    fused = _numbered((2, 4, 16, 64))
    parts = keymap.to_foreign("blocks.1.attention.qkv.weight", fused)
    prefix = "model.layers.1.self_attn"
    for head in range(4):
        expected = fused[head // 2, head % 2]
        assert torch.equal(parts[f"{prefix}.q_proj.weight"][16 * head : 16 * head + 16], expected)
    for head in range(2):
        assert torch.equal(parts[f"{prefix}.k_proj.weight"][16 * head : 16 * head + 16], fused[head, 2])
        assert torch.equal(parts[f"{prefix}.v_proj.weight"][16 * head : 16 * head + 16], fused[head, 3])
    gate_up = _numbered((2, 96, 64))
    parts = keymap.to_foreign("blocks.0.mlp.gate_up.weight", gate_up)
    assert torch.equal(parts["model.layers.0.mlp.gate_proj.weight"], gate_up[0])
    assert torch.equal(parts["model.layers.0.mlp.up_proj.weight"], gate_up[1])


def test_gpt2_rows_by_hand():
    keymap = KeyMap(GPT2)  # 3 heads of size 16
    fused = _numbered((3, 3, 16, 48))
    (conv,) = keymap.to_foreign("blocks.0.attention.qkv.weight", fused).values()
    (row,) = keymap.to_foreign("blocks.0.attention.qkv.bias", fused[..., 0]).values()
    for kind in range(3):
        for head in range(3):
            start = 48 * kind + 16 * head
            assert torch.equal(conv[:, start : start + 16], fused[head, kind].T)
            assert torch.equal(row[start : start + 16], fused[head, kind, :, 0])
    (down,) = keymap.to_foreign("blocks.0.mlp.down.weight", _numbered((48, 112))).values()
    assert torch.equal(down, _numbered((48, 112)).T)


def test_gpt_neox_rows_by_hand():
    keymap = KeyMap(CASES["gpt-neox"])  # 3 heads of size 16
    fused = _numbered((3, 3, 16, 48))
    (rows,) = keymap.to_foreign("blocks.1.attention.qkv.weight", fused).values()
    for head in range(3):
        for kind in range(3):
            start = 48 * head + 16 * kind
            assert torch.equal(rows[start : start + 16], fused[head, kind])


def test_gemma_norms_by_hand():
    """Their post_attention_layernorm is another norm than Llama's of that name."""
    names = KeyMap(CASES["gemma3"]).foreign_names
    assert names("blocks.1.attention_post_norm.weight") == ("model.layers.1.post_attention_layernorm.weight",)
    assert names("blocks.1.mlp_norm.weight") == ("model.layers.1.pre_feedforward_layernorm.weight",)
    assert KeyMap(LLAMA).foreign_names("blocks.1.mlp_norm.weight") == ("model.layers.1.post_attention_layernorm.weight",)


def test_a_tensor_without_a_place_is_an_error():
    with pytest.raises(UserError, match="no place for embedding.positions.weight"):
        KeyMap(replace(LLAMA, family="custom", positions="learned"), LLAMA_FAMILY.rules)
    with pytest.raises(UserError, match="family=custom: has no place for embedding.tokens.weight"):
        KeyMap(replace(LLAMA, family="custom"))
    shorter = tuple(rule for rule in LLAMA_FAMILY.rules if not rule.logical.startswith("final_norm"))
    with pytest.raises(UserError, match="no place for final_norm.weight"):
        KeyMap(LLAMA, shorter)


def test_missing_unknown_and_misshapen_keys_are_told_at_once():
    keymap = KeyMap(LLAMA)
    shapes = dict(keymap.foreign_shapes)
    del shapes["model.norm.weight"]
    shapes["model.norm.scale"] = (64,)
    shapes["lm_head.weight"] = (VOCAB_SIZE + 1, 64)
    with pytest.raises(UserError) as caught:
        keymap.check_foreign(shapes)
    for part in ("lacks model.norm.weight", "unknown model.norm.scale", "lm_head.weight has shape [291, 64]"):
        assert part in str(caught.value)


def test_a_tensor_of_another_shape_is_refused():
    keymap = KeyMap(LLAMA)
    with pytest.raises(UserError, match="final_norm.weight: has shape"):
        keymap.to_foreign("final_norm.weight", torch.zeros(63))
    with pytest.raises(UserError, match="model.norm.weight: has shape"):
        keymap.to_logical("final_norm.weight", lambda key: torch.zeros(63))
