"""Fine-tuning: labelled rows, the task's own figures, and the weights of a checkpoint to begin with."""

from __future__ import annotations

from data_pipeline.encoded_rows import read_encoded
from data_pipeline.row_loader import RowLoader
from train.attempt import Attempt
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.store import CheckpointStore
from train.config.finetune import FinetuneConfig
from train.engine import Engine
from train.evaluate.examiner import TaskExaminer
from train.groundwork.finetuning import ROWS_FOLDER, TOKENIZER_FOLDER, base_of
from train.held_out import Evaluator
from train.initial import check_initial_model, head_changes, initial_folder
from train.metrics import Metrics, NullMetrics
from train.model.transformer import Reading
from train.parallel import ParallelContext
from train.stages.training import Material


def material(config: FinetuneConfig, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics) -> Material:
    """What a fine-tuning run reads, is measured by and begins with."""
    rows = read_encoded(attempt.run_dir / ROWS_FOLDER, verify=context.is_first)
    common = {
        "sequence_length": config.sequence_length,
        "seed": config.run.seed,
        "vocab_size": config.model.vocab_size,
    }

    def examiner(engine: Engine) -> TaskExaminer | None:
        if config.evaluate.max_samples == 0 or not rows.num_rows("validation"):
            return None
        held_out = Evaluator(config, context=context, engine=engine, loader=RowLoader(rows, split="validation", **common))
        return TaskExaminer(config, context=context, engine=engine, held_out=held_out, rows=rows)

    def begin(engine: Engine, store: CheckpointStore) -> None:
        check_initial_model(config)
        folder = initial_folder(config.initial_checkpoint)
        heads = head_changes(CheckpointReader(folder).model, config.model)
        store.load_weights(engine, folder, new=heads.new, left_out=heads.left_out)

    return Material(
        reading=Reading(sequence_length=config.sequence_length, document_mask=True),
        loader=RowLoader(rows, split="train", pin=context.device.type == "cuda", **common),
        examiner=examiner,
        begin=begin,
        tokenizer_folder=attempt.run_dir / TOKENIZER_FOLDER,
        fingerprint=rows.fingerprint,
        base=base_of(config, attempt.run_dir),
    )
