"""Generation against a loop without a cache; the stage from a checkpoint on disk to the console."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tests.unit.convert.checkpoints import GPT2, LLAMA, write_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.generate import GenerateConfig
from train.inference.cached import CachedDecoder
from train.inference.generation import Request, generate_ids
from train.inference.load import load_decoder, resolve_device, resolve_dtype
from train.inference.sampling import Sampling
from train.model.transformer import Reading
from train.precision import Cpu, bf16_on_cpu
from train.stages.generate import run

CPU = torch.device("cpu")
PROMPT = (5, 77, 12, 200)


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def reader(request, tmp_path):
    return CheckpointReader(write_checkpoint(tmp_path / "run", request.param))


def _decoder(reader):
    return load_decoder(reader, torch.float32, device=CPU)


def _ids(reader, **settings):
    request = Request(**({"prompt": PROMPT, "max_new_tokens": 20, "sampling": Sampling(temperature=0.9)} | settings))
    return list(generate_ids(CachedDecoder(_decoder(reader), reader.config.model), request))


def test_greedy_ids_are_those_of_the_whole_sequence_run_again(reader):
    decoder = _decoder(reader)
    ids = list(PROMPT)
    for _ in range(20):
        decoder.read_as(Reading(sequence_length=len(ids), document_mask=False))
        with torch.no_grad():
            logits_TV = decoder.logits(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]))
        ids.append(logits_TV[-1].argmax().item())
    assert [row[0] for row in _ids(reader, sampling=Sampling(temperature=0))] == ids[len(PROMPT) :]


def test_a_sample_depends_on_the_seed_and_its_number_alone(reader):
    three = _ids(reader, num_samples=3, seed=5)
    alone = _ids(reader, num_samples=1, seed=5)
    assert [row[0] for row in three] == [row[0] for row in alone]
    assert _ids(reader, num_samples=3, seed=5) == three
    assert _ids(reader, num_samples=3, seed=6) != three
    columns = {tuple(row[sample] for row in three) for sample in range(3)}
    assert len(columns) == 3
    assert max(max(row) for row in three) < reader.config.model.vocab_size


def test_a_prompt_longer_than_a_chunk_is_the_same(reader, monkeypatch):
    whole = _ids(reader, sampling=Sampling(temperature=0))
    monkeypatch.setattr("train.inference.generation.PREFILL_TOKENS", 3)
    assert _ids(reader, sampling=Sampling(temperature=0)) == whole


def test_ids_that_the_tokenizer_cannot_spell_are_never_chosen(reader):
    free = _ids(reader, max_new_tokens=100, sampling=Sampling(temperature=3.0))
    bound = _ids(reader, max_new_tokens=100, sampling=Sampling(temperature=3.0), num_known_ids=100)
    assert max(row[0] for row in free) > 200
    assert max(row[0] for row in bound) < 100


def test_the_context_is_used_up_to_its_end_and_not_beyond(reader):
    fits = reader.config.model.max_positions - len(PROMPT) + 1
    assert len(_ids(reader, max_new_tokens=fits)) == fits
    with pytest.raises(UserError, match="exceed model.max_positions=160"):
        _ids(reader, max_new_tokens=fits + 1)


def test_an_empty_prompt_and_damaged_weights(reader):
    with pytest.raises(UserError, match="prompt"):
        _ids(reader, prompt=())
    decoder = _decoder(reader)
    decoder.blocks[0].attention.output.weight.fill_(float("nan"))
    request = Request(prompt=PROMPT, max_new_tokens=2, sampling=Sampling())
    with pytest.raises(UserError, match="not finite"):
        next(generate_ids(CachedDecoder(decoder, reader.config.model), request))


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match="device=cuda"):
        resolve_device("cuda")
    for flag, dtype in (("avx2", torch.float32), ("avx512_bf16", torch.bfloat16)):
        cpu = Cpu(machine="x86_64", flags=frozenset({flag}))
        monkeypatch.setattr("train.precision.bf16_on_cpu", partial(bf16_on_cpu, cpu, {}))
        assert resolve_dtype("auto", CPU) == dtype
    assert resolve_dtype("bf16", CPU) == torch.bfloat16


def _config(tmp_path, **settings):
    return GenerateConfig(**({"checkpoint": str(tmp_path / "run"), "prompt": "def main(", "max_new_tokens": 12} | settings))


def test_the_stage_streams_text_and_tells_its_speed(reader, tmp_path, capsys):
    assert run(_config(tmp_path, num_samples=2, device="cpu")) == 0
    shown = capsys.readouterr()
    assert "--- sample 1 of 2 ---" in shown.out
    assert "tokens/s" in shown.err
    assert "step-00000007" in shown.err
    again = tmp_path / "prompt.txt"
    again.write_text("def main(", encoding="utf-8")
    assert run(_config(tmp_path, num_samples=2, device="cpu", prompt=None, prompt_file=str(again), stream=False)) == 0
    assert capsys.readouterr().out == shown.out


def test_a_run_in_bf16(reader, tmp_path, capsys):
    assert run(_config(tmp_path, temperature=0, dtype="bf16", device="cpu")) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_prompt_file_that_cannot_be_read(reader, tmp_path):
    config = _config(tmp_path, prompt=None, prompt_file=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        run(config)
    for content, told in ((b"\xff\xfe", "not UTF-8"), (b"", "is empty")):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=told):
            run(replace(config, prompt_file=str(tmp_path / "bad.txt")))


def test_every_problem_of_the_settings_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        GenerateConfig(
            checkpoint="",
            prompt="a",
            prompt_file="b",
            max_new_tokens=0,
            temperature=-1,
            top_k=0,
            top_p=2,
            stop=("",),
            num_samples=0,
        )
    assert len(caught.value.problems) == 8
    with pytest.raises(ConfigError, match="all samples are the same"):
        GenerateConfig(checkpoint="a", prompt="b", temperature=0, num_samples=2)


def test_the_command_lines_words():
    words = ["checkpoint=runs/first", "prompt=a b", "stop=[END,stop]", "top_p=0.9", "temperature=0"]
    config = validate(GenerateConfig, compose("generate", words))
    assert (config.prompt, config.stop, config.top_p, config.temperature) == ("a b", ("END", "stop"), 0.9, 0)
    with pytest.raises(ConfigError, match="checkpoint"):
        validate(GenerateConfig, compose("generate", ["prompt=a"]))
