"""megatron-core's split linear and embedding layers, made to take and return [T, H] tensors as torch's own do.

Values are left unset and filled by logical name, so megatron-core's own initialisation never runs.
"""

from __future__ import annotations

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor

from train.model.crossings import replicated
from train.parallel import TensorRanks


def _settings(tensor: TensorRanks) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor.size,
        sequence_parallel=tensor.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


class Expand(ColumnParallelLinear):
    """[T or T / t, H] -> [T, out / t]: the rank's part of the output, for all tokens."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, tensor: TensorRanks) -> None:
        super().__init__(
            in_size,
            out_size,
            config=_settings(tensor),
            init_method=_leave,
            bias=bias,
            gather_output=False,
            tp_group=tensor.group,
        )

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The rank's columns of the product."""
        return super().forward(hidden_TH)[0]


class Reduce(RowParallelLinear):
    """[T, in / t] -> [T or T / t, H]: the sum over the ranks, whole or the rank's rows of it."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, tensor: TensorRanks) -> None:
        super().__init__(
            in_size,
            out_size,
            config=_settings(tensor),
            init_method=_leave,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,  # added here, with a gradient that counts every rank's rows
            tp_group=tensor.group,
        )
        self.tensor = tensor

    def forward(self, parts: Tensor) -> Tensor:
        """The sum of the ranks' products, and the bias once."""
        output_TH, bias = super().forward(parts)
        return output_TH if bias is None else output_TH + replicated(bias, self.tensor, partial=False)


class Lookup(VocabParallelEmbedding):
    """[T] ids -> [T or T / t, H]: each rank looks up the ids of its rows, the results are summed."""

    def __init__(self, rows: int, width: int, *, tensor: TensorRanks) -> None:
        super().__init__(
            rows,
            width,
            init_method=_leave,
            reduce_scatter_embeddings=tensor.sequence_parallel,
            config=_settings(tensor),
            tp_group=tensor.group,
        )

    def forward(self, tokens_T: Tensor) -> Tensor:
        """The embeddings of all tokens, or of the rank's rows."""
        # megatron-core scatters [batch, sequence] ids along the sequence.
        return super().forward(tokens_T.unsqueeze(0)).flatten(0, 1)
