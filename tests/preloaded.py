"""What the forkserver of `tests.dist` loads before it forks a rank: all that a run imports, early or late.

Some imports are hidden in the libraries' functions (torch's compiler, the optimizers of DeepSpeed, the storage of
megatron-core, the models of transformers): a rank would spend six seconds on them. The frozen heap saves another one and a
half, as DeepSpeed collects garbage six times while it starts.
"""

from __future__ import annotations

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import megatron.core.datasets.indexed_dataset  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import train.stages.pretrain  # noqa: F401

gc.collect()
gc.freeze()
