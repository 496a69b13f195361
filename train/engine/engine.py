"""The training step. ZeRO stage, precision and accumulation are settled here; the loop sees plain numbers.

The loss is normalised by the global number of target tokens, summed over all ranks and micro-batches before the first
backward pass, so uneven packing does not weigh some tokens more than others.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conf.errors import UserError
from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.config.training import ComputePrecision, OptimConfig, ParallelConfig
from train.engine import fragments
from train.engine.contract import Answers, Batch, EvaluationResult, StepResult
from train.engine.optimizers import make_optimizer, update_stance
from train.model.heads import IGNORE, ClassificationHead, LossHead
from train.model.init import keyed_seed
from train.model.logical import logical_of, logical_parameters
from train.model.lora import settings_of
from train.model.transformer import Decoder, Layer, materialise
from train.optim import OptimizerSpec
from train.parallel import ParallelContext
from train.provenance import check_deepspeed

PROBE_TOKENS, PROBE_POSITIONS = 64, 4
NO_WEIGHTS = "nothing has given the engine its weights: call initialise, or load a checkpoint"
Taken = TypeVar("Taken")


def _nothing() -> None:
    pass


class _Clock:
    """Time between two places in the work of a device. Made where it starts; read after the step's results are there."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._on_gpu = device.type == "cuda"
        self.stop()

    def stop(self) -> None:
        """Mark a place."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> float:
        """Between the first place and the last."""
        if self._on_gpu:
            return self._events[0].elapsed_time(self._events[-1]) / 1000
        return self._times[-1] - self._times[0]


class Engine:
    """A model under DeepSpeed ZeRO 1, 2 or 3; what of it needs no gradient is frozen, and has no optimizer state.

    It has no weights until `initialise`, or what writes into its fragments and says `loaded`, gives it some.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        optimizer: OptimizerSpec,
        parallel: ParallelConfig,
        precision: ComputePrecision,
        micro_batch: int,
        dropout_seed: int,
        context: ParallelContext,
    ) -> None:
        self.context = context
        self.zero = parallel.zero
        self.dropout_seed = dropout_seed
        self._spec = optimizer
        config = deepspeed_config(optimizer.settings, parallel, precision, micro_batch)
        self._deepspeed, self._optimizer = initialize(build_module(layers, config, context), optimizer, config, context)
        if context.data_parallel == 1 and hasattr(self._optimizer, "fp32_groups_flat_partition"):
            # One data rank has nothing to reduce, yet DeepSpeed would copy all gradients out and back: 6 % of a CPU's step.
            self._deepspeed.enable_backward_allreduce = False
        fragments.create_state(self._optimizer, self.zero)
        for piece in (*self.fragments(), *self.frozen_fragments()):
            piece.tensors["weight"].fill_(torch.nan)  # so that one which nothing is written to is found
        self._has_weights = False

    @property
    def module(self) -> Decoder:
        """The model; under ZeRO 3 its weights are gathered while a layer runs."""
        return self._deepspeed.module

    def train_step(
        self, batches: Sequence[Batch], *, lr: float, step: int, before_update: Callable[[], None] = _nothing
    ) -> StepResult:
        """One optimizer step over `batches`, this rank's micro-batches.

        All ranks must call it with equally many. A non-finite loss or gradient skips the update, nothing of it reaches
        weights or moments: `skipped` tells. `before_update` is called when all gradients are there, right before weights
        and moments change.
        """
        assert self._has_weights, NO_WEIGHTS
        device = self.context.device
        local_targets = sum(batch.target_tokens for batch in batches)
        targets = torch.tensor(local_targets, dtype=torch.int64, device=device)
        self.context.sum_over_data(targets)
        busy = _Clock(device)
        # DeepSpeed averages gradients over the data-parallel ranks: undo that, divide by the global count instead.
        scale = self.context.data_parallel / targets.clamp(min=1)
        names = self.module.layers[-1].figures
        sums = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
        self._deepspeed.train()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._deepspeed.set_gradient_accumulation_boundary(last)
            self._seed_dropout(step, index)
            objective, loss, _, *figures = self._deepspeed(*self._on_device(batch))
            sums += torch.cat((loss.view(1), *figures))
            if last:
                busy.stop()
                self.context.sum_over_data(sums)
                # A loss that is not finite may have gradients that are. They are made NaN here, without the CPU looking, so
                # that one check, DeepSpeed's of the gradients' norm, keeps both from weights and moments.
                scale = torch.where(sums[0].isfinite(), scale, torch.nan)
            self._deepspeed.backward(objective * scale, scale_wrt_gas=False)
        before_update()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        skipped_before = self._deepspeed.skipped_steps
        with update_stance(self._spec):
            self._deepspeed.step()
        skipped = self._deepspeed.skipped_steps > skipped_before
        if skipped and self.zero == 3:
            # A step that is skipped leaves out what stage 3 does behind one with the small weights that it keeps gathered,
            # and a later evaluation then stops with a "tracing error". The weights are put where they were.
            fragments.publish_weights(self._optimizer, self.zero)
        loss_sum, *figure_sums = sums.tolist()
        return StepResult(
            loss_sum=loss_sum,
            target_tokens=int(targets.item()),
            grad_norm=float(self._deepspeed.get_global_grad_norm()),
            skipped=skipped,
            busy_seconds=busy.seconds(),
            figures=dict(zip(names, figure_sums, strict=True)),
        )

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, compiled: bool = True) -> EvaluationResult:
        """Loss of one micro-batch without gradients; under ZeRO 3 all ranks must call it together.

        `compiled` False is for a shape that is seen now and then: compiling it would take longer than it ever saves.
        """
        assert self._has_weights, NO_WEIGHTS
        self._deepspeed.eval()
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            _, loss, targets, *figures = self._deepspeed(*self._on_device(batch))
        sums = figures[0].tolist() if figures else ()
        return EvaluationResult(loss_sum=float(loss), target_tokens=int(targets), figures=tuple(sums))

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of the targets of each document of a micro-batch, summed, fp32 [D]; a model of preferences, all ranks together."""
        return self._before_head(self._on_device(batch), lambda head, state: head.log_probabilities(state)[0]).cpu()

    def ask(self, tokens_BS: Tensor, places_P: Tensor, options_PO: Tensor) -> Answers:
        """What the model expects behind some tokens, whose places count through B x S; all ranks together.

        The sequences are read each as a whole, and may be shorter than the run's.
        """
        device = self.context.device
        places_P, options_PO = places_P.to(device), options_PO.to(device)
        log_probability_PO, likeliest_P = self._on_the_way(
            tokens_BS, lambda head, hidden_TH: head.answers(hidden_TH, places_P, options_PO)
        )
        return Answers(log_probability=log_probability_PO.cpu(), likeliest=likeliest_P.cpu())

    def probe(self) -> Tensor:
        """Logits of a fixed batch at its last positions, fp32 [PROBE_POSITIONS, V or labels]; all ranks together.

        They tell whether weights that come back are the weights that were saved, and whether they still mean the same.
        """
        length, vocab_size = min(PROBE_TOKENS, self.module.reading.sequence_length), self.module.vocab_size
        tokens_T = (torch.arange(length) * 7919 + 13).remainder(vocab_size)
        logits_TV = self._on_the_way(tokens_T.unsqueeze(0), lambda head, hidden_TH: head.logits(hidden_TH))
        return logits_TV[-PROBE_POSITIONS:, :vocab_size].float()

    @torch.no_grad()
    def _on_the_way(self, tokens_BS: Tensor, take: Callable[[LossHead | ClassificationHead, Tensor], Taken]) -> Taken:
        """What `take` makes of the head and of the hidden states that reach it, for sequences of any length."""
        model = self.module
        reading, (batch, length) = model.reading, tokens_BS.shape
        tokens_T = tokens_BS.reshape(-1)
        positions_T, bounds = torch.arange(length).repeat(batch), torch.tensor([0, len(tokens_T)], dtype=torch.int32)
        no_labels_T = torch.full_like(tokens_T, IGNORE)
        tensors = [tensor.to(self.context.device) for tensor in (tokens_T, no_labels_T, positions_T, bounds)]
        model.read_as(replace(reading, sequence_length=length, document_mask=False))
        try:
            # Compiled, this shape would take a minute, and it is seen only here.
            with torch.compiler.set_stance("force_eager"):
                return self._before_head(tensors, lambda head, state: take(head, state[0]))
        finally:
            model.read_as(reading)

    def _before_head(self, tensors: Sequence[Tensor], take: Callable[[Any, tuple[Tensor, ...]], Taken]) -> Taken:
        assert self._has_weights, NO_WEIGHTS
        # A whole forward pass, with what is wanted taken on the way: stage 3 keeps the order of the modules in mind, and one
        # that ended before the head would be an error at the next evaluation.
        seen: list[Taken] = []
        hook = self.module.layers[-1].register_forward_pre_hook(lambda head, inputs: seen.append(take(head, inputs[0])))
        self._deepspeed.eval()
        try:
            self._deepspeed(*tensors)
        finally:
            hook.remove()
        return seen[0]

    @contextmanager
    def whole(self) -> Iterator[Decoder]:
        """The model with all weights on every rank, dropout off, for what runs apart from the step; all ranks together."""
        self._deepspeed.eval()
        if self.zero < 3:
            yield self.module
            return
        gathered = load_deepspeed(self.context).zero.GatheredParameters(list(self.module.parameters()))
        with gathered, fragments.without_hooks(self.module):
            yield self.module
        fragments.gather_small(self._optimizer)

    def fragments(self) -> list[fragments.Fragment]:
        """This rank's part of the fp32 weights that train and of the optimizer's state, as live views."""
        return fragments.fragments_of(self.module, self._optimizer, self.zero)

    def frozen_fragments(self) -> list[fragments.Fragment]:
        """This rank's part of the weights that do not train, as live views in the dtype of the model."""
        return fragments.frozen_fragments(self.module, self.zero)

    @property
    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> logical shape of all that the model has, adapters included, in the order of the layers."""
        return {name: logical_of(value).shape for name, value in logical_parameters(self.module).items()}

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Logical names of what does not train, in the order of the layers."""
        return tuple(name for name, value in logical_parameters(self.module).items() if not value.requires_grad)

    @property
    def adapter(self) -> LoraConfig | None:
        """The settings of the model's adapters; None: it has none."""
        return settings_of(self.module)

    def norms(self) -> dict[str, float]:
        """Norm of every weight and of what the optimizer keeps of it, by `kind/logical name`; all ranks together."""
        mine: dict[str, float] = {}
        for piece in self.fragments():
            if piece.logical.parts > 1 or self.context.tensor.rank == 0:  # what all tensor ranks hold counts once
                for kind, tensor in piece.tensors.items():
                    mine[f"{kind}/{piece.logical.name}"] = tensor.double().square().sum().item()
        parts = self.context.gather_to_all(mine)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: math.sqrt(sum(part.get(name, 0.0) for part in parts)) for name in names}

    def initialise(self, model: ModelConfig, seed: int) -> None:
        """Begin with the initial values of all weights; every rank draws its own part of them."""
        fragments.draw_weights((*self.fragments(), *self.frozen_fragments()), model=model, seed=seed)
        self.loaded(updates=0)

    def loaded(self, updates: int) -> None:
        """Take over what was written into fragments of either kind: `updates` optimizer updates had been applied.

        Raises UserError on all ranks when, before the first update, a weight begins or ends with NaN, as all do that nothing
        was written to.
        """
        if updates == 0:
            own = fragments.unset((*self.fragments(), *self.frozen_fragments()))
            if names := sorted({name for part in self.context.gather_to_all(own) for name in part}):
                raise UserError(
                    f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: is not a number; the checkpoint that the run "
                    f"begins with gives no sound value; take another one"
                )
        self._has_weights = True
        fragments.set_update_count(self._optimizer, self.zero, updates)
        fragments.publish_weights(self._optimizer, self.zero)

    @property
    def updates(self) -> int:
        """Optimizer updates applied so far; a skipped step is none."""
        return fragments.update_count(self._optimizer, self.zero)

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Dropout depends on the position in the run alone, so a resumed run draws what the undisturbed one drew.

        Ranks with other rows of the hidden states draw for themselves; ranks that hold the same rows drop the same.
        """
        tensor = self.context.tensor
        rows = tensor.rank if tensor.sequence_parallel else 0
        torch.manual_seed(keyed_seed(self.dropout_seed, "dropout", step, micro_batch, self.context.data_rank, rows))

    def _on_device(self, batch: Batch) -> tuple[Tensor, ...]:
        tensors = (batch.tokens, batch.labels, batch.positions, batch.document_bounds, batch.references)
        return tuple(tensor.to(self.context.device, non_blocking=True) for tensor in tensors if tensor is not None)


def load_deepspeed(context: ParallelContext) -> ModuleType:
    """DeepSpeed, told where it is before it looks for itself.

    Raises UserError for a version that would train otherwise than it is told.
    """
    check_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)
    os.environ.setdefault("LOCAL_RANK", str(context.local_rank))  # DeepSpeed insists on it, also under srun
    if context.device.type == "cpu":
        # Or ZeRO 3 asks `numactl` for the sockets whenever it reduces gradients, in a process of its own each time: 160 of them
        # in 20 steps of two layers. The number counts in ZeRO++ only, which is not used.
        os.environ.setdefault("LOCAL_SIZE", "1")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory collective serves inference only, and building it takes 30 s and a compiler at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(module: nn.Module, spec: OptimizerSpec, config: dict, context: ParallelContext) -> tuple[Any, Any]:
    """(DeepSpeed's engine, its optimizer) around `module`."""
    deepspeed = load_deepspeed(context)
    wrapped_bf16 = config["bf16"]["enabled"] and config["zero_optimization"]["stage"] == 1
    optimizer = make_optimizer(module, spec, partitioned=not wrapped_bf16, group=context.data_group)
    with redirect_stdout(StringIO()):  # it prints a dozen lines on memory
        engine, wrapped, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=context.mpu, dist_init_required=False
        )
    return engine, wrapped


def build_module(layers: Sequence[Layer], config: dict, context: ParallelContext) -> Decoder:
    """The model on this rank's device, in the dtype that it computes in. Its memory holds no values yet.

    Under ZeRO 3 each layer is sharded as soon as it has memory, so a rank holds one whole layer at a time, never the model.
    """
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    module = Decoder(list(layers))
    sharded = config["zero_optimization"]["stage"] == 3
    for layer in module.layers:
        materialise(layer, lambda empty: torch.empty(empty.shape, dtype=dtype, device=context.device))
        if sharded:  # a tied weight was sharded with the first layer that has it, and is left alone
            load_deepspeed(context).zero.Init(
                module=layer, data_parallel_group=context.data_group, config_dict_or_path=config, mpu=context.mpu
            )
    return module


def deepspeed_config(optim: OptimConfig, parallel: ParallelConfig, precision: ComputePrecision, micro_batch: int) -> dict:
    """DeepSpeed's dictionary for our settings.

    Accumulation is driven by the caller (a batch ramp changes it), so DeepSpeed's own is 1. Gradients are summed over the
    ranks in fp32; left alone, DeepSpeed would sum them in bf16. Overlapped reduction stays off: under stage 2 it has been
    seen to change gradients (DeepSpeed issues 5294 and 4298).
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip or 0.0,
        "bf16": {"enabled": precision != "fp32"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": parallel.zero,
            "reduce_bucket_size": parallel.bucket_elements,
            "allgather_bucket_size": parallel.bucket_elements,
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
    }
