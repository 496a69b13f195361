"""The model card: README.md of an export. Says how the model was made, how it scores and what the proof found; no path of
any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.chat import chat_template
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.reader import CheckpointReader
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig, Origin
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.convert.card_scores import model_index, score_lines
from train.convert.report import proof_lines, source_name
from train.model.cost import num_parameters
from train.scores.record import Evaluation

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
_PLAIN = 'return_tensors="pt", add_special_tokens=False'
_LOSSES = {"loss": "training loss", "validation_loss": "held-out loss"}


def model_card(reader: CheckpointReader, report: dict[str, Any], evaluations: Sequence[Evaluation] = ()) -> str:
    """Markdown, with the metadata block that the Hugging Face hub reads."""
    settings, model = reader.settings, reader.model
    if isinstance(settings, ImportedConfig):
        name, tag = settings.origin.source, "imported"
        made = "taken over as it was, not trained,"
        history: list[tuple[str, object]] = [("source", _origin(settings.origin))]
    else:
        tuned = isinstance(settings, FinetuneConfig)
        name, tag = settings.run.name.rsplit("/", 1)[-1], "finetuned" if tuned else "pretrained"
        made = f"{'fine-tuned' if tuned else 'pretrained'} to step {reader.step:,} ({reader.tokens:,} tokens)"
        history = _training_rows(reader, settings)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: text-{'classification' if model.labels else 'generation'}",
            f"tags: [{model.family}, longhaul, {tag}]",
            *model_index(name, evaluations),
            "---",
            "",
            f"# {name}",
            "",
            *_use(reader, made),
            "",
            "## Model",
            "",
            *_table(_model_rows(model)),
            "",
            "## Training",
            "",
            *_table(history),
            "",
            "## Scores",
            "",
            *score_lines(evaluations),
            "",
            "## Proof of the conversion",
            "",
            *proof_lines(report),
            "",
        ]
    )


def adapter_card(
    reader: CheckpointReader, base_model: str, report: dict[str, Any], evaluations: Sequence[Evaluation] = ()
) -> str:
    """The same for adapters alone."""
    settings, model, lora = reader.settings, reader.model, reader.adapter
    assert isinstance(settings, FinetuneConfig) and lora is not None, "only a fine-tuning trains adapters"
    name = settings.run.name.rsplit("/", 1)[-1]
    labels = f", id2label={dict(enumerate(model.labels))}" if model.labels else ""
    auto = f"AutoModelFor{'SequenceClassification' if model.labels else 'CausalLM'}"
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {base_model}",
            f"pipeline_tag: text-{'classification' if model.labels else 'generation'}",
            f"tags: [{model.family}, lora, longhaul, finetuned]",
            *model_index(name, evaluations),
            "---",
            "",
            f"# {name}",
            "",
            f"Adapters ({kind}, rank {lora.rank}, alpha {lora.alpha:g}) beside {base_model}, trained to step {reader.step:,} "
            "with Longhaul.",
            "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            'folder = "path/to/this/folder"',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base_model}"{labels}), folder)',
            *_example(reader),
            "```",
            "",
            "## Training",
            "",
            *_table(_training_rows(reader, settings)),
            "",
            "## Scores",
            "",
            *score_lines(evaluations),
            "",
            "## Proof of the conversion",
            "",
            *proof_lines(report),
            "",
        ]
    )


def _use(reader: CheckpointReader, made: str) -> list[str]:
    model, auto = reader.model, f"AutoModelFor{'SequenceClassification' if reader.model.labels else 'CausalLM'}"
    kind = f"model of {num_parameters(model):,} parameters that tells {len(model.labels)} labels apart"
    if not model.labels:
        kind = f"language model of {num_parameters(model):,} parameters"
    return [
        f"A {model.family} {kind}, {made} with Longhaul. {_does(reader)}",
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder)",
        *_example(reader),
        "```",
        *(_SEVERAL_TEXTS if model.labels else ()),
    ]


_SEVERAL_TEXTS = (
    "",
    "Several texts together need an id of padding (`pad_token_id`), and transformers reads a text at its last token that "
    "is not this id. It is set where the tokenizer has such a token of its own. Otherwise it is left out, and several "
    "texts are refused: set it to an id that no text ends in, for the tokenizer as well. The end token is one only where "
    "texts do not end in it.",
)


def _does(reader: CheckpointReader) -> str:
    settings = reader.settings
    if reader.model.labels:
        return "It reads a text and tells the label at its last token."
    if not isinstance(settings, FinetuneConfig):
        return "It continues text; it was not tuned to follow instructions here."
    if settings.task.kind == "dialogue":
        system = " ".join((settings.data.system or "").split())
        said = f" In training the system said first: {system}" if system else ""
        return f"It answers in dialogues, written by its chat template.{said}"
    if settings.task.kind == "preference":
        return "Of two answers to a prompt, in the form of its training, it was taught which one is preferred."
    return "It writes what belongs behind a prompt, in the form of its training."


def _example(reader: CheckpointReader) -> list[str]:
    """Lines that ask the model, whose text begins as texts began in its training."""
    settings, tokenizer = reader.settings, Tokenizer(reader.tokenizer_folder)
    opens = isinstance(settings, ImportedConfig) or bool(getattr(settings, "opening", False))
    opening = tokenizer.opening() if opens else []
    how = 'return_tensors="pt"' if opening else _PLAIN
    if reader.model.labels:
        return [
            f'inputs = tokenizer("Write the text as in training", {how})',
            "print(model.config.id2label[model(**inputs).logits.argmax().item()])",
        ]
    if isinstance(settings, FinetuneConfig) and settings.task.kind == "dialogue":
        text = chat_template(tokenizer, None).render([{"role": "user", "content": "Hello"}], generation_prompt=True)
        written = tokenizer.encode(text, special=True)[: len(opening)] == opening
        return [
            'messages = [{"role": "user", "content": "Hello"}]',
            "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            f"inputs = tokenizer(text, {_PLAIN if written else how})",
            "made = model.generate(**inputs, max_new_tokens=200)[0]",
            'print(tokenizer.decode(made[inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    return [
        f'inputs = tokenizer("Once upon a time", {how})',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ]


def _origin(origin: Origin) -> str:
    return origin.source + ("" if origin.revision is None else f", commit {origin.revision}")


def _model_rows(model: ModelConfig) -> list[tuple[str, object]]:
    rope = f", rotary base {model.rope.base:g}, scaling {model.rope.scaling}" if model.positions == "rotary" else ""
    return [
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("heads", f"{model.num_heads}, of size {model.head_dim}; {model.kv_heads} key-value heads"),
        ("inner width", f"{model.ffn_size}, {model.mlp}"),
        ("positions", f"{model.positions}, up to {model.max_positions}{rope}"),
        ("vocabulary", f"{model.vocab_size:,}{_head_words(model)}"),
        *([("labels", ", ".join(model.labels))] if model.labels else []),
    ]


def _head_words(model: ModelConfig) -> str:
    if model.labels:
        return ""
    return f"; head {'tied' if model.tied_head else 'of its own'}"


def _training_rows(reader: CheckpointReader, config: PretrainConfig | FinetuneConfig) -> list[tuple[str, object]]:
    optim, schedule, health = config.optim, config.schedule, reader.manifest.health
    first = config.initial_checkpoint
    return [
        ("began with", "random weights" if first is None else f"the weights of {source_name(first)}"),
        ("step", f"{reader.step:,}"),
        ("tokens", f"{reader.tokens:,}"),
        *((told, f"{health[name]:.4f}") for name, told in _LOSSES.items() if name in health),
        *_data_rows(config),
        ("batch", f"{config.batch.sequences} sequences"),
        (
            "optimizer",
            f"{_OPTIMIZERS[optim.kind]}, betas {optim.beta1:g} and {optim.beta2:g}, weight decay {optim.weight_decay:g}",
        ),
        ("learning rate", f"{optim.lr:g}, {schedule.kind}, {schedule.warmup_steps} steps of warm-up"),
        ("precision", config.precision),
        ("seed", config.run.seed),
    ]


def _data_rows(config: PretrainConfig | FinetuneConfig) -> list[tuple[str, object]]:
    if isinstance(config, FinetuneConfig):
        rows = ", ".join(source.label for source in config.task.data)
        kind = config.task.kind if config.task.name == config.task.kind else f"{config.task.name}, a {config.task.kind}"
        return [("task", kind), ("data", f"rows of {rows}"), ("sequence length", f"{config.sequence_length}, rows apart")]
    blend = ", ".join(f"{source.label} (weight {source.weight:g})" for source in config.data.sources)
    apart = "apart" if config.data.document_mask else "seeing each other"
    return [("data", blend), ("sequence length", f"{config.data.sequence_length}, documents {apart}")]


def _table(rows: list[tuple[str, object]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
