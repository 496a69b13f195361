"""The model card: README.md of an export. Says how the model was made and what the proof found; no path of any machine."""

from __future__ import annotations

from typing import Any

from train.checkpoint.reader import CheckpointReader
from train.config.pretrain import PretrainConfig
from train.model.cost import num_parameters


def model_card(reader: CheckpointReader, report: dict[str, Any]) -> str:
    """Markdown, with the metadata block that the Hugging Face hub reads."""
    config = reader.config
    name = config.run.name.rsplit("/", 1)[-1]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [{config.model.family}, longhaul, pretrained]",
            "---",
            "",
            f"# {name}",
            "",
            f"A {config.model.family} language model of {num_parameters(config.model):,} parameters, pretrained with "
            f"Longhaul to step {reader.step:,} ({reader.tokens:,} tokens). It continues text; it was not tuned to follow "
            "instructions.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "path/to/this/folder"',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            'inputs = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            "```",
            "",
            "## Model",
            "",
            *_table(_model_rows(config)),
            "",
            "## Training",
            "",
            *_table(_training_rows(reader, config)),
            "",
            "## Proof of the conversion",
            "",
            *_proof_lines(report),
            "",
        ]
    )


def _model_rows(config: PretrainConfig) -> list[tuple[str, object]]:
    model = config.model
    rope = f", rotary base {model.rope.base:g}, scaling {model.rope.scaling}" if model.positions == "rotary" else ""
    return [
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("heads", f"{model.num_heads}, of size {model.head_dim}; {model.kv_heads} key-value heads"),
        ("inner width", f"{model.ffn_size}, {model.mlp}"),
        ("positions", f"{model.positions}, up to {model.max_positions}{rope}"),
        ("vocabulary", f"{model.vocab_size:,}; head {'tied' if model.tied_head else 'of its own'}"),
    ]


def _training_rows(reader: CheckpointReader, config: PretrainConfig) -> list[tuple[str, object]]:
    blend = ", ".join(f"{source.label} (weight {source.weight:g})" for source in config.data.sources)
    optim, schedule = config.optim, config.schedule
    apart = "apart" if config.data.document_mask else "seeing each other"
    return [
        ("step", f"{reader.step:,}"),
        ("tokens", f"{reader.tokens:,}"),
        ("data", blend),
        ("sequence length", f"{config.data.sequence_length}, documents {apart}"),
        ("batch", f"{config.batch.sequences} sequences"),
        ("optimizer", f"AdamW, betas {optim.beta1:g} and {optim.beta2:g}, weight decay {optim.weight_decay:g}"),
        ("learning rate", f"{optim.lr:g}, {schedule.kind}, {schedule.warmup_steps} steps of warm-up"),
        ("precision", config.precision),
        ("seed", config.run.seed),
    ]


def _proof_lines(report: dict[str, Any]) -> list[str]:
    if not report["proof"]:
        return ["None was asked for (`proof=false`)."]
    logits, loss = report["proof"]["logits"], report["proof"]["held_out_loss"]
    lines = [
        f"Weights are written in {report['dtype']}. Loaded by transformers {report['versions']['transformers']} and "
        "compared in fp32 with the checkpoint in Longhaul:",
        "",
        f"- logits differ by at most {logits['max_abs_difference']:.2g} over {logits['positions']} positions",
    ]
    if "not_measured" in loss:
        return [*lines, "- held-out loss: not measured"]
    figures = f"{loss['longhaul']:.6f} in Longhaul, {loss['transformers']:.6f} in transformers"
    return [*lines, f"- held-out loss over {loss['targets']:,} tokens: {figures}"]


def _table(rows: list[tuple[str, object]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
