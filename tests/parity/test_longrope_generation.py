"""Generation across the limit where longrope changes its frequencies: against contexts run whole, and against Phi 3's own."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.parity.custom import LIMIT, LONGROPE, make_custom_pair
from tests.parity.hugging_face import rope_parameters
from tests.parity.pairs import VOCAB_SIZE, Pair
from train.inference.cached import CachedDecoder
from train.inference.generation import Request, generate_ids
from train.inference.sampling import Sampling

LENGTH = 150
GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("prompt", [LIMIT - 5, LIMIT, LIMIT + 1, LIMIT + 30])
def test_what_the_whole_context_gives(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a context is rotated anew where it outgrows the limit; the chunks of a prompt know how long it is."""
    monkeypatch.setattr("train.inference.generation.PREFILL_TOKENS", 16)
    pair = make_custom_pair("longrope")
    context = torch.randint(VOCAB_SIZE, (prompt,), generator=torch.Generator().manual_seed(4)).tolist()
    request = Request(prompt=tuple(context), max_new_tokens=12, sampling=GREEDY, num_samples=2)
    found = list(generate_ids(CachedDecoder(pair.ours(LENGTH), pair.model), request))
    with torch.no_grad():
        for ids in found:
            expected = pair.theirs(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
            assert ids == [expected, expected]
            context.append(expected)


@pytest.mark.parametrize("prompt", [LIMIT - 6, LIMIT + 10])
def test_what_phi3_generates(prompt: int) -> None:
    pair = make_custom_pair("longrope")
    prompt_1S = torch.randint(VOCAB_SIZE, (1, prompt), generator=torch.Generator().manual_seed(8))
    expected_1S = _phi3(pair).generate(prompt_1S, max_new_tokens=14, do_sample=False)
    request = Request(prompt=tuple(prompt_1S[0].tolist()), max_new_tokens=14, sampling=GREEDY)
    found = [ids[0] for ids in generate_ids(CachedDecoder(pair.ours(LENGTH), pair.model), request)]
    assert found == expected_1S[0, prompt:].tolist()


def _phi3(pair: Pair) -> transformers.PreTrainedModel:
    """Phi 3 with the weights of the pair's Llama, whose matrices it has side by side."""
    model = pair.model
    config = transformers.Phi3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_positions,
        original_max_position_embeddings=LIMIT,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope_parameters(LONGROPE),
        tie_word_embeddings=model.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    weights = dict(pair.theirs.state_dict())
    for layer in range(model.num_layers):
        for block, joined, parts in (("self_attn", "qkv", "qkv"), ("mlp", "gate_up", ("gate", "up"))):
            name = f"model.layers.{layer}.{block}"
            weights[f"{name}.{joined}_proj.weight"] = torch.cat([weights.pop(f"{name}.{part}_proj.weight") for part in parts])
    module = transformers.Phi3ForCausalLM(config).eval()
    module.load_state_dict(weights)
    return module
