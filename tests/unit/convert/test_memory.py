"""Memory of a conversion: bounded by the largest tensors, whatever the size of the model. Measured, so it takes a while."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.foreign import save
from tests.timeouts import scaled

MIB = 1024**2
WIDTH, INNER, VOCAB = 768, 2048, 4000


def folder_of(path: Path, num_layers: int) -> Path:
    """A random Llama in bf16."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=num_layers, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return save(LlamaForCausalLM(config), path, dtype=torch.bfloat16)


def peak_bytes(*words: str) -> int:
    """Largest resident memory of the command's process, mapped files included."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tools.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                peak[0] = max(peak[0], psutil.Process(process.pid).memory_info().rss)
            except psutil.Error:
                continue
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, told = process.communicate(timeout=scaled(280))
    watcher.join()
    assert process.returncode == 0, told.decode()
    return peak[0]


@pytest.mark.campaign(name="memory")
def test_a_larger_model_takes_no_more_memory(tmp_path):
    """Without the proof, whose process has a test of its own."""
    peaks: dict[int, list[int]] = {}
    for num_layers in (2, 40):
        folder, ours, back = (tmp_path / f"{name}{num_layers}" for name in ("hf", "ours", "back"))
        folder_of(folder, num_layers)
        peaks[num_layers] = [
            peak_bytes("import", f"hf={folder}", f"out={ours}", "proof=false"),
            peak_bytes("export", f"checkpoint={ours}", f"out={back}", "proof=false"),
        ]
    before, after = load_file(tmp_path / "hf40" / "model.safetensors"), load_file(tmp_path / "back40" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    more = sum(tensor.nbytes for tensor in before.values()) * 38 // 40
    assert more > 450 * MIB
    for few, many in zip(*peaks.values(), strict=True):
        print(f"{few / MIB:.0f} and {many / MIB:.0f} MiB, for {more / MIB:.0f} MiB more of weights")
        assert many - few < more / 4
