"""The proof of exported adapters: beside the base, as PEFT puts them there, they say what the merged checkpoint says."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from train.checkpoint.reader import CheckpointReader
from train.config.model import ModelConfig
from train.convert.hf_export import plan_weights, write_model
from train.convert.peft_export import WEIGHTS
from train.convert.proof.files import prove_tokenizer
from train.convert.proof.finding import Finding
from train.convert.proof.labels import prove_rows
from train.convert.proof.losses import prove_perplexity
from train.convert.proof.ours import OurModel
from train.convert.proof.outputs import prove_generation, prove_logits
from train.convert.proof.theirs import UNREADABLE, TheirModel

SHARD_BYTES = 5_000_000_000


def prove_adapters(reader: CheckpointReader, folder: Path, *, held_out: Finding) -> list[Finding]:
    """All checks, in order; those that need the model of PEFT are left out when it does not load.

    The base is the checkpoint that the adapters stand on, written out in fp32: a published one may be rounded. It is held
    whole. `held_out` says why no held-out loss is measured.
    """
    assert reader.base is not None, "adapters stand beside a base"
    tokenizer = prove_tokenizer(reader.tokenizer_folder, folder)
    with TemporaryDirectory() as base:
        write_model(reader.base, plan_weights(reader.base, "fp32", shard_bytes=SHARD_BYTES), Path(base), dtype="fp32")
        theirs, weights = _open_beside(Path(base), folder, reader.model)
        if theirs is None:
            return [weights, tokenizer]
        model, ours = reader.model, OurModel(reader, reader.model, None)
        findings = [weights, tokenizer, prove_logits(ours, theirs, model)]
        if model.labels:
            findings.append(prove_rows(ours, theirs, model, tokenizer_folder=folder, is_foreign=True))
        else:
            findings.append(prove_generation(ours, theirs, model))
            findings.append(prove_perplexity(ours, theirs, model, tokenizer_folder=reader.tokenizer_folder))
    return [*findings, held_out]


def _open_beside(base: Path, folder: Path, model: ModelConfig) -> tuple[TheirModel | None, Finding]:
    """The base with its adapters; none where PEFT does not take exactly the tensors of the folder."""
    words = {"num_labels": len(model.labels)} if model.labels else {}
    auto = AutoModelForSequenceClassification if model.labels else AutoModelForCausalLM
    try:
        module = auto.from_pretrained(base, dtype=torch.float32, local_files_only=True, **words)
        beside = PeftModel.from_pretrained(module, folder)  # which changes the module
    except UNREADABLE as error:
        return None, Finding(name="weights", problems=(f"PEFT cannot put the adapters beside their base: {error}",))
    written, taken = load_file(folder / WEIGHTS), get_peft_model_state_dict(beside)
    other = [
        name
        for name in dict.fromkeys([*written, *taken])
        if name not in written or name not in taken or not torch.equal(written[name], taken[name])
    ]
    problems = (f"{len(other)} tensors are not those that PEFT takes: {other[:5]}",) if other else ()
    finding = Finding(name="weights", figures={"tensors": len(taken), "bit_equal": not other}, problems=problems)
    return (None if problems else TheirModel(module, model)), finding
