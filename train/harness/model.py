"""`lm_eval --model longhaul`: a checkpoint, or a Hugging Face folder, as lm-eval asks for a model.

Tokens, windows and stops are those of lm-eval's own `hf` model, so that both give the same scores of the same weights; the
rest is train.inference. Every rank gets all requests and does its part of them, so lm-eval itself sees one process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from conf.errors import UserError
from train.companions import ranks
from train.convert.hf_reader import tokenizer_of_transformers
from train.evaluate.engines import Engines
from train.evaluate.subject import Subject, load_engines, open_subject
from train.inference.batched import Prompt
from train.inference.generation import Continuation
from train.inference.likelihood import LikelihoodRequest
from train.inference.load import check_divisible, resolve_device
from train.inference.sampling import Sampling
from train.inference.special import special_id
from train.parallel import ParallelContext, single_process
from train.precision import resolve_precision

_log = logging.getLogger(__name__)

TokenRequest = tuple[Any, list[int], list[int]]
MOST_NEW_TOKENS = 256  # lm-eval's own default where a task does not say
DTYPES = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16", "fp32": "fp32", "bf16": "bf16"}
"""lm-eval's `hf` says float32 and bfloat16."""
SAMPLING_WORDS = {"do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of one request."""

    input_tokens: int
    target_tokens: int = 0
    output_tokens: int = 0


def _device_name(asked: Any) -> Literal["auto", "cpu", "cuda"]:
    """lm-eval asks for cuda:0 where nobody said anything, which without CUDA means a CPU, as for `hf`."""
    name = str(asked or "auto").partition(":")[0]
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={asked}: must be auto, cpu or cuda")
    return "auto" if name == "cuda" else name


def _dtype_name(asked: Any) -> str:
    # torch.bfloat16, as a program may hand it over, is written with its module.
    name = DTYPES.get(str(asked).removeprefix("torch."))
    if name is None:
        raise UserError(f"dtype={asked}: must be one of {', '.join(DTYPES)}")
    return name


def _count(name: str, asked: Any) -> int:
    """A number of something, at least 1; lm-eval makes an int of a word where it can."""
    try:
        number = int(str(asked))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name}={asked}: must be a whole number, at least 1")
    return number


@register_model("longhaul")
class LonghaulLM(TemplateLM):
    """The model that lm-eval asks. All ranks must ask for the same."""

    def __init__(
        self,
        checkpoint: str | None = None,
        hf: str | None = None,
        *,
        loaded: tuple[Subject, Engines, ParallelContext] | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        """checkpoint, hf: the model, as for `longhaul evaluate`; max_length: tokens that it reads at most, None: all it can.

        settings: processes, tensor, device, dtype, batch_tokens, verify as there. lm-eval's batch_size is not used: batches
        are of batch_tokens tokens. `loaded`: a model that is in memory already.
        Raises UserError for a model that is not there, or settings that do not fit it.
        """
        super().__init__()
        self._stack = contextlib.ExitStack()
        if loaded is None:
            loaded = self._load(checkpoint, hf, **settings)
        self.subject, self.engines, self.context = loaded
        most = self.subject.model.max_positions
        if max_length is not None and not (isinstance(max_length, int) and 2 <= max_length <= most):
            raise UserError(f"max_length={max_length}: must lie between 2 and the model's {most}")
        self.max_length = max_length or most
        self._device = self.context.device
        self._encoded: dict[str, list[int]] = {}
        self.lengths: dict[tuple[str, ...], Lengths] = {}
        """(context, continuation), or (text,) of a rolling request -> what the model read for it."""
        self.written: dict[tuple[str, str], Lengths] = {}
        """(context, text that the model wrote) -> what it read and wrote; the text may be no whole tokens any more."""

    def _load(self, checkpoint: str | None, hf: str | None, **settings: Any) -> tuple[Subject, Engines, ParallelContext]:
        if (checkpoint is None) == (hf is None):
            raise UserError("model_args: give exactly one of checkpoint=FOLDER and hf=FOLDER")
        size = settings.pop("batch_size", 1)
        settings.pop("max_batch_size", None)
        if size not in (1, "1", "auto"):
            _log.warning("batch_size=%s is not used: batches are of tokens, give model_args batch_tokens=4096, say", size)
        processes, tensor = (_count(name, settings.pop(name, 1)) for name in ("processes", "tensor"))
        device = resolve_device(_device_name(settings.pop("device", None)))
        dtype, verify = _dtype_name(settings.pop("dtype", "auto")), settings.pop("verify", True)
        if verify not in (True, False):
            raise UserError(f"verify={verify}: must be true or false")
        asked = settings.pop("batch_tokens", None)
        batch_tokens = None if asked is None else _count("batch_tokens", asked)
        if settings:
            raise UserError(
                f"model_args: {', '.join(settings)}: no such setting; there are checkpoint, hf, processes, tensor, device, "
                "dtype, batch_tokens, verify and max_length"
            )
        if processes % tensor:
            raise UserError(f"tensor={tensor}: must divide processes={processes}; give processes={tensor}")
        subject = open_subject(checkpoint, hf, verify=False, hashed=False)
        check_divisible(subject.model, tensor)
        context = single_process(device.type)
        if processes > 1:
            context = self._stack.enter_context(ranks(processes, device.type, tensor_parallel=tensor))
        dtype = context.from_first(resolve_precision(dtype, device.type).precision)
        if context.is_first:  # the others take the files on its word
            subject = open_subject(checkpoint, hf, verify=verify)
        return subject, load_engines(subject, context, dtype=dtype, batch_tokens=batch_tokens), context

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        end = self.subject.end_of_document
        return self.subject.first[-1] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the beginning of a text, or else the end of another."""
        begin = special_id(self.subject.tokenizer, "bos_token")
        return self.eot_token_id if begin is None else begin

    @cached_property
    def _prefix_text(self) -> str:
        return self.subject.tokenizer.backend.id_to_token(self.prefix_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what the tokenizer puts before one, unless the text has it already."""
        tokenizer = self.subject.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        opening = self._opening if add_special_tokens else []
        ids = self._encoded.get(string)
        return [*opening, *(tokenizer.encode(string, special=True) if ids is None else ids)]

    @cached_property
    def _opening(self) -> list[int]:
        return self.subject.tokenizer.opening()

    # --- what lm-eval asks for

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding gives) of each continuation after its context."""
        # lm-eval asks for the ids of one text at a time: of each context without the space behind it, and of both together.
        texts = {
            text
            for context, continuation in (one.args for one in requests)
            for text in (context + continuation, context.rstrip())
        }
        self._encoded = dict(zip(texts, self.subject.tokenizer.encode_all(list(texts), special=True), strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding gives) of each continuation; contexts are cut on the left."""
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        with self._bar(len(asked), "loglikelihood", disable_tqdm) as bar:
            found = self.engines.scorer.score(asked, progress=bar.update)
        answers = [(-one.loss, one.is_greedy) for one in found]
        for (key, _, _), read, answer in zip(requests, asked, answers, strict=True):
            if key is not None:  # the windows of a rolling request are kept together
                self.lengths[key] = Lengths(input_tokens=len(read.context), target_tokens=len(read.continuation))
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> LikelihoodRequest:
        if not continuation or len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens: needs at least 1, and at most the {self.max_length} that the "
                f"model reads; the task does not fit this model"
            )
        kept = [*context, *continuation][-(self.max_length + 1) :]
        place = len(kept) - len(continuation)
        return LikelihoodRequest(context=kept[:place], continuation=kept[place:])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of the longest context."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in rolling]
            windows += [(None, context, continuation) for context, continuation in parts]
            owners += [number] * len(parts)
            self.lengths[request.args] = Lengths(
                input_tokens=sum(len(context) + len(continuation) - 1 for context, continuation in parts),
                target_tokens=sum(len(continuation) for _, continuation in parts),
            )
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop."""
        end_text = self.subject.tokenizer.backend.id_to_token(self.eot_token_id)
        asked = [request.args for request in requests]
        prompts = [self._prompt(context, options) for context, options in asked]
        untils = [normalize_gen_kwargs(options, MOST_NEW_TOKENS).pop("until", None) for _, options in asked]
        stops = [[text for text in handle_stop_sequences(until, eos=end_text) if text] for until in untils]

        def watch(number: int) -> Continuation:
            return Continuation(self.subject.tokenizer.stream(), stop=stops[number], ends=[self.eot_token_id])

        with self._bar(len(prompts), "generate_until", disable_tqdm) as bar:
            found = self.engines.generator.generate(prompts, watch, progress=bar.update)
        texts = []
        for request, prompt, ids, until in zip(requests, prompts, found, stops, strict=True):
            text = self.subject.tokenizer.decode(ids)
            texts.append(postprocess_generated_text(generation=text, stop=until, think_end_token=None))
            self.written[request.args[0], texts[-1]] = Lengths(input_tokens=len(prompt.ids), output_tokens=len(ids))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _prompt(self, context: str, options: dict[str, Any]) -> Prompt:
        kwargs = normalize_gen_kwargs(options, MOST_NEW_TOKENS)
        kwargs.pop("until", None)
        newest = kwargs.pop("max_gen_toks")
        if unknown := sorted(set(kwargs) - SAMPLING_WORDS):
            raise UserError(f"generation_kwargs: {', '.join(unknown)}: not known here; {', '.join(sorted(SAMPLING_WORDS))} are")
        room = self.max_length - newest
        if room < 1:
            raise UserError(
                f"max_gen_toks={newest}: leaves no room for a context, as the model reads {self.max_length} tokens; give "
                "--gen_kwargs max_gen_toks=N"
            )
        temperature = float(kwargs.get("temperature", 0.0)) if kwargs.get("do_sample") else 0.0
        sampling = Sampling(temperature=temperature, top_k=kwargs.get("top_k"), top_p=kwargs.get("top_p"))
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Prompt(ids=tuple(ids[-room:]), max_new_tokens=newest, sampling=sampling)

    def _bar(self, total: int, title: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=title, disable=True if disable or not self.context.is_first else None)

    # --- chat templates

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers reads it: for its chat template alone."""
        return tokenizer_of_transformers(self.subject.tokenizer.folder)

    @property
    def tokenizer_name(self) -> str:
        """Part of the names under which lm-eval keeps requests."""
        return self.subject.tokenizer.sha256[:16]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one prompt, by the template of the tokenizer's folder. Raises UserError where it has none."""
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.subject.tokenizer.folder}: has no chat template; leave --apply_chat_template out")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps with its results."""
        identity = self.subject.identity
        return {
            "model_num_parameters": identity["parameters"],
            "model_dtype": str(self.engines.scorer.cached.weight.dtype),
            "model_revision": identity.get("step", identity.get("revision")),
            "model_sha": identity["hash"],
        }
