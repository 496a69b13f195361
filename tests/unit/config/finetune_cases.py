"""Rules of fine-tuning runs, and of what came with them: verb, words, and how the one problem begins."""

from __future__ import annotations

FINETUNE_CASES: list[tuple[str, list[str], str]] = [
    ("finetune", ["initial_checkpoint=''"], "initial_checkpoint='': needs the folder of a checkpoint or of a run"),
    (
        "finetune",
        ["task=language"],
        "task.kind=language: is measured, not learned; choose a task of classification, generation",
    ),
    ("finetune", ["evaluate.probes=[copying]"], "evaluate.probes=['copying']: are of pretraining"),
    (
        "finetune",
        ["method=lora", "precision=fp8", "model.num_layers=4"],
        "precision=fp8: adapters stand beside weights in bf16",
    ),
    ("finetune", ["method=lora", "optim.kind=muon"], "optim.kind=muon: is for whole matrices, and with lora none is trained"),
    ("finetune", ["method=lora", "method.frozen=[embedding.*]"], "method.frozen=['embedding.*']: with lora all weights are"),
    ("finetune", ["method.layer_decay=0"], "method.layer_decay=0.0: must be above 0 and at most 1"),
    ("finetune", ["method.neftune_alpha=0"], "method.neftune_alpha=0.0: must be above 0; null adds no noise"),
    ("finetune", ["method.lora.rank=0"], "method.lora.rank=0: must be at least 1; 8 to 64 is usual"),
    ("finetune", ["method.lora.alpha=0"], "method.lora.alpha=0.0: must be positive; twice the rank is usual"),
    ("finetune", ["method.lora.dropout=1"], "method.lora.dropout=1.0: must be at least 0 and below 1"),
    ("finetune", ["method.lora.targets=[]"], "method.lora.targets=[]: leaves nothing to train"),
    ("finetune", ["scoring.max_rows=-1"], "scoring.max_rows=-1: must not be negative; null takes all, 0 writes none"),
    ("finetune", ["scoring.shown=-1"], "scoring.shown=-1: must not be negative; 0 shows none"),
    ("finetune", ["data.sequence_length=1"], "data.sequence_length=1: must be at least 2, one to read and one to predict"),
    ("pretrain", ["model.labels=[a]"], "model.labels=['a']: a head tells at least 2 apart"),
    ("pretrain", ["model.labels=[a,b,a]"], "model.labels: hold a more than once"),
    ("pretrain", ["model.labels=[a,'']"], "model.labels: hold an empty name"),
    ("pretrain", ["schedule.warmup_steps=0", "schedule.warmup_fraction=2"], "schedule.warmup_fraction=2.0: must lie between 0"),
    ("pretrain", ["schedule.warmup_fraction=0.1"], "schedule.warmup_fraction=0.1: warmup_steps=200 is given too; set it to 0"),
    ("pretrain", ["evaluate.patience=0"], "evaluate.patience=0: must be at least 1; null never ends a run early"),
    ("pretrain", ["evaluate.patience=2", "evaluate.every_steps=null"], "evaluate.patience=2: needs evaluations on the way"),
    ("pretrain", ["evaluate.least_gain=-1"], "evaluate.least_gain=-1.0: must not be negative"),
    ("pretrain", ["budget.steps=null", "budget.epochs=0"], "budget.epochs=0.0: must be above 0"),
    ("pretrain", ["budget.steps=null", "budget.epochs=2"], "budget.epochs=2: is of fine-tuning; give budget.tokens or"),
    ("pretrain", ["budget.epochs=2"], "budget.steps=5000: budget.epochs=2.0 is given too; set one of them to null"),
]
