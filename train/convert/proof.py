"""The proof of an export: transformers, reading the folder, computes what our decoder computes with the checkpoint's weights.

Our side is built from the checkpoint, not from the folder, so that a fault of the key map shows even where its inverse would
undo it. Everything is compared in fp32 on the CPU, with the weights rounded as they were written.

Shapes: S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from conf.errors import UserError
from data_pipeline.loader import IGNORE, Loader, MicroBatch
from data_pipeline.tokenizer import Tokenizer
from train.config.model import ModelConfig
from train.convert.keymap import KeyMap
from train.inference.cached import CachedDecoder
from train.inference.generation import Request, generate_ids
from train.inference.load import WeightReader, assemble_decoder
from train.inference.sampling import Sampling
from train.model.blueprint import Blueprint
from train.model.transformer import Decoder, Reading

LOGITS_TOLERANCE = 1e-4
"""Largest difference of a logit."""
LOSS_TOLERANCE = 1e-4
"""Largest difference of the mean loss of a target, in nats."""
MIN_POSITIONS = 1000
"""Positions at which the likeliest token must be the same."""
MAX_LENGTH = 512
"""Longest random sequence."""
PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 16, 16, 4
SAMPLE_TEXT = "def main(argv):\n    return 0  # naïve — 日本語 😀\n\n\tif x!=1.5e-3: print('don\\'t')\n"

Figures: TypeAlias = dict[str, float | int | str | list[str]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: what was measured, and what is wrong (empty: it passed)."""

    name: str
    figures: Figures = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def load_ours(reader: WeightReader, dtype: torch.dtype) -> Decoder:
    """The checkpoint's decoder in fp32, its weights rounded to `dtype` first."""
    model = reader.config.model
    return assemble_decoder(
        Blueprint(model=model),
        lambda name: reader.read(name).to(dtype).float(),
        reading=Reading(sequence_length=model.max_positions, document_mask=False),
    )


def load_theirs(folder: Path) -> tuple[PreTrainedModel | None, Finding]:
    """The folder's model in fp32 as transformers reads it; no model when keys or shapes differ."""
    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, Finding(name="keys", problems=(f"transformers cannot read the folder: {error}",))
    problems = tuple(
        f"{kind}: {sorted(str(key) for key in info[kind])[:5]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    )
    count = sum(parameter.numel() for parameter in theirs.parameters())
    finding = Finding(name="keys", figures={"parameters": count, "class": type(theirs).__name__}, problems=problems)
    return (None if problems else theirs.eval()), finding


def prove_weights(reader: WeightReader, folder: Path, dtype: torch.dtype) -> Finding:
    """The folder's weights, mapped back, are the checkpoint's to the bit; keys are complete and none is unknown."""
    keymap = KeyMap(reader.config.model)
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle = safe_open(path, framework="pt")
        files |= dict.fromkeys(handle.keys(), handle)
    try:
        keymap.check_foreign({key: tuple(handle.get_slice(key).get_shape()) for key, handle in files.items()})
    except UserError as error:
        return Finding(name="weights", problems=(str(error),))
    different = []
    for name in tqdm(keymap.logical_shapes, desc="weights mapped back", unit="tensor", disable=None):
        back = keymap.to_logical(name, lambda key: files[key].get_tensor(key))
        expected = reader.read(name).to(dtype)
        if name in ("embedding.tokens.weight", "head.weight"):  # padding rows are cut
            back, expected = (tensor[: reader.config.model.vocab_size] for tensor in (back, expected))
        if back.dtype != dtype or not torch.equal(back, expected):
            different.append(name)
    problems = (f"{len(different)} tensors differ from the checkpoint's: {different[:5]}",) if different else ()
    return Finding(
        name="weights", figures={"tensors": len(files), "bit_equal": len(files) and not different}, problems=problems
    )


def prove_logits(ours: Decoder, theirs: PreTrainedModel, model: ModelConfig) -> Finding:
    """Logits of random ids, the last sequence at the far end of the context; the likeliest token at each position."""
    length = min(model.max_positions, MAX_LENGTH)
    ours.read_as(Reading(sequence_length=length, document_mask=False))
    num_sequences = ceil(MIN_POSITIONS / length) + 1
    generator = torch.Generator().manual_seed(0)
    worst, equal, ties = 0.0, 0, 0
    for number in tqdm(range(num_sequences), desc="logits", unit="sequence", disable=None):
        tokens_S = torch.randint(model.vocab_size, (length,), generator=generator)
        start = model.max_positions - length if number == num_sequences - 1 else 0
        positions_S = torch.arange(start, start + length)
        with torch.inference_mode():
            ours_SV = ours.logits(tokens_S, positions_S, torch.tensor([0, length]))[:, : model.vocab_size]
            theirs_SV = theirs(input_ids=tokens_S[None], position_ids=positions_S[None]).logits[0]
        difference = (ours_SV - theirs_SV).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
        same_S = ours_SV.argmax(dim=1) == theirs_SV.argmax(dim=1)
        equal += int(same_S.sum())
        # Two tokens whose logits lie within the tolerance have no order that fp32 could keep.
        ties += int((~same_S & (_margin(ours_SV) <= LOGITS_TOLERANCE)).sum())
    total = num_sequences * length
    problems = []
    if worst > LOGITS_TOLERANCE:
        problems.append(f"logits differ by up to {worst:.3g}, allowed is {LOGITS_TOLERANCE:g}")
    if equal + ties < total or equal < MIN_POSITIONS:
        problems.append(f"the likeliest token is the same at {equal} of {total} positions")
    figures: Figures = {"max_abs_difference": worst, "tolerance": LOGITS_TOLERANCE, "positions": total}
    return Finding(name="logits", figures=figures | {"argmax_equal": equal, "argmax_ties": ties}, problems=tuple(problems))


def prove_generation(ours: Decoder, theirs: PreTrainedModel, model: ModelConfig) -> Finding:
    """Greedy continuations of random prompts, ours over the key-value cache, theirs by `generate`."""
    prompt_tokens = min(PROMPT_TOKENS, max(1, model.max_positions // 2))
    new_tokens = min(NEW_TOKENS, model.max_positions - prompt_tokens)
    theirs.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    generator = torch.Generator().manual_seed(1)
    problems = []
    for number in range(PROMPTS):
        prompt_1S = torch.randint(model.vocab_size, (1, prompt_tokens), generator=generator)
        request = Request(prompt=tuple(prompt_1S[0].tolist()), max_new_tokens=new_tokens, sampling=Sampling(temperature=0))
        our_ids = [ids[0] for ids in generate_ids(CachedDecoder(ours, model), request)]
        whole_1S = theirs.generate(prompt_1S, attention_mask=torch.ones_like(prompt_1S))
        their_ids = whole_1S[0, prompt_tokens:].tolist()
        if our_ids != their_ids and not _parted_at_a_tie(ours, [*request.prompt, *our_ids], whole_1S[0].tolist()):
            problems.append(f"prompt {number}: ours {our_ids}, theirs {their_ids}")
    return Finding(name="generation", figures={"prompts": PROMPTS, "new_tokens": new_tokens}, problems=tuple(problems))


def prove_tokenizer(source: Path, folder: Path) -> Finding:
    """The folder's tokenizer, as transformers reads it, gives the ids that training saw."""
    expected = Tokenizer(source).encode(SAMPLE_TEXT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding(name="tokenizer", problems=(f"transformers cannot read it: {error}",))
    found = tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids
    problems = () if found == expected else (f"a sample text becomes {found[:20]}, expected {expected[:20]}",)
    return Finding(name="tokenizer", figures={"tokens": len(expected)}, problems=problems)


def prove_loss(ours: Decoder, theirs: PreTrainedModel, loader: Loader, *, limit: int | None) -> Finding:
    """The loss of held-out text: ours packed as in training, theirs document by document."""
    count = loader.num_samples if limit is None else min(limit, loader.num_samples)
    ours.read_as(Reading(sequence_length=loader.sequence_length, document_mask=loader.document_mask))
    our_sum, their_sum, targets = 0.0, 0.0, 0
    with torch.inference_mode():
        for number in tqdm(range(count), desc="held-out loss", unit="sequence", disable=None):
            batch = loader.micro_batch([number])
            _, loss, _ = ours(batch.tokens, batch.labels, batch.positions, batch.document_bounds)
            our_sum += loss.item()
            their_sum += _their_loss(theirs, batch)
            targets += batch.target_tokens
    our_loss, their_loss = our_sum / targets, their_sum / targets
    difference = abs(our_loss - their_loss)
    problems = ()
    if not difference <= LOSS_TOLERANCE:
        problems = (f"held-out loss: ours {our_loss:.6f}, theirs {their_loss:.6f}, allowed is {LOSS_TOLERANCE:g}",)
    figures: Figures = {
        "longhaul": our_loss,
        "transformers": their_loss,
        "difference": difference,
        "tolerance": LOSS_TOLERANCE,
        "targets": targets,
        "sequences": count,
        "sequences_held_out": loader.num_samples,
    }
    return Finding(name="held_out_loss", figures=figures, problems=problems)


def _their_loss(theirs: PreTrainedModel, batch: MicroBatch) -> float:
    """Sum of the losses of one micro-batch's targets, each document a sequence of its own."""
    bounds = batch.document_bounds.unique().tolist()
    total = 0.0
    for start, end in zip(bounds, bounds[1:], strict=False):
        labels_S = batch.labels[start:end]
        if (labels_S == IGNORE).all():
            continue
        tokens_1S, positions_1S = (row[start:end].unsqueeze(0) for row in (batch.tokens, batch.positions))
        logits_SV = theirs(input_ids=tokens_1S, position_ids=positions_1S).logits[0]
        total += F.cross_entropy(logits_SV.float(), labels_S, ignore_index=IGNORE, reduction="sum").item()
    return total


def _margin(logits_SV: Tensor) -> Tensor:
    """Distance [S] of the two largest logits."""
    best_S2 = logits_SV.topk(min(2, logits_SV.shape[1]), dim=1).values
    return best_S2[:, 0] - best_S2[:, -1]


def _parted_at_a_tie(ours: Decoder, our_ids: list[int], their_ids: list[int]) -> bool:
    """Whether two continuations part at a position where two tokens are equally likely."""
    pairs = enumerate(zip(our_ids, their_ids, strict=False))
    parted = next((place for place, (mine, other) in pairs if mine != other), None)
    if parted is None:
        return False
    ours.read_as(Reading(sequence_length=parted, document_mask=False))
    prefix_S = torch.tensor(our_ids[:parted])
    with torch.inference_mode():
        logits_SV = ours.logits(prefix_S, torch.arange(parted), torch.tensor([0, parted]))
    return _margin(logits_SV[-1:]).item() <= LOGITS_TOLERANCE


def prove(
    reader: WeightReader,
    folder: Path,
    *,
    tokenizer_folder: Path,
    dtype: torch.dtype,
    held_out: Loader | Finding,
    limit: int | None,
) -> list[Finding]:
    """All checks, in order; those that need the loaded model are left out when it does not load.

    `held_out` is the held-out text, of which `limit` sequences are read, or a finding that says why there is none.
    """
    model = reader.config.model
    theirs, keys = load_theirs(folder)
    findings = [keys, prove_weights(reader, folder, dtype), prove_tokenizer(tokenizer_folder, folder)]
    if theirs is None:
        return findings
    ours = load_ours(reader, dtype)
    findings += [prove_logits(ours, theirs, model), prove_generation(ours, theirs, model)]
    findings.append(held_out if isinstance(held_out, Finding) else prove_loss(ours, theirs, held_out, limit=limit))
    return findings
