"""Hugging Face's Llama doing the work of `longhaul bench step`: fp32 weights under bf16 autocast, as its Trainer runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from tools.bench_step import StepBenchConfig


def hugging_face_step(config: StepBenchConfig, device: torch.device, *, compiled: bool) -> Callable[[], Any]:
    """One optimizer step, as a function: sdpa attention, fused AdamW, gradient clipping; `compiled` by torch.compile."""
    model = config.model
    settings = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_head,
        attn_implementation="sdpa",
        use_cache=False,
    )
    module: Any = LlamaForCausalLM(settings).to(device)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-4, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, fused=True
    )
    parameters = list(module.parameters())
    if compiled:
        module = torch.compile(module)
    tokens_BS = torch.randint(model.vocab_size, (config.micro_batch, config.sequence_length + 1), device=device)

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision != "fp32"):
            loss = module(input_ids=tokens_BS[:, :-1], labels=tokens_BS[:, :-1]).loss
        loss.backward()
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
