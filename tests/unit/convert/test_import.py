"""What can be wrong with a folder of Hugging Face: one clear error, and nothing written. And what an interruption leaves."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conf.errors import UserError
from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import train_tokenizer
from tests.parity.foreign import build, save
from train.checkpoint.manifest import read_manifest
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.settings import read_settings
from train.config.hf_import import ImportConfig
from train.convert.proof.files import prove_tokenizer
from train.convert.proof.theirs import open_theirs
from train.stages import hf_import

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("llama"), tmp_path_factory.mktemp("theirs") / "llama")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "theirs"))


def run(folder: Path, **settings) -> Path:
    out = folder.parent / "out"
    hf_import.run(ImportConfig(hf=str(folder), out=str(out), proof=False, **settings))
    return out


def refused(folder: Path, match: str, **settings) -> None:
    with pytest.raises(UserError, match=match):
        run(folder, **settings)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was written"


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def as_shards(folder: Path) -> dict:
    """Cut the weights into two files with an index; returns its map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    place = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    write_index(folder, place)
    return place


def write_index(folder: Path, place: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def _nan(weights):
    weights[QUERY][3, 4] = float("nan")


WEIGHTS = {
    "missing": (lambda weights: weights.pop(QUERY), f"lacks {QUERY}"),
    "extra": (lambda weights: weights.update({"model.layers.7.more": torch.zeros(2)}), "holds unknown model.layers.7.more"),
    "misshaped": (lambda weights: weights.update({QUERY: weights[QUERY].flatten()}), rf"{QUERY} has shape \[2304\], expected"),
    "not-finite": (_nan, f"{QUERY} holds values that are not finite"),
    "quantised": (lambda weights: weights.update({QUERY: weights[QUERY].to(torch.int8)}), "of no dtype of weights; only F32"),
    "twice": (lambda weights: weights.update({QUERY[6:]: weights[QUERY].clone()}), "both mean"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_the_models(case, folder):
    change, text = WEIGHTS[case]
    change_weights(folder, change)
    refused(folder, text)


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_a_file_that_is_cut_off(size, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "is no whole safetensors file")


def test_shards_and_their_index(folder):
    reference = CheckpointReader(run(folder))
    shutil.rmtree(reference.path)
    place = as_shards(folder)
    reader = CheckpointReader(run(folder))
    original = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(reader.read("embedding.tokens.weight")[:290], original["model.embed_tokens.weight"])
    shutil.rmtree(reader.path)

    write_index(folder, {name: file for name, file in place.items() if name != QUERY})
    refused(folder, f"its index and its files differ.*{QUERY}")
    write_index(folder, place | {QUERY: "../elsewhere.safetensors"})
    refused(folder, "names a file outside its folder")
    write_index(folder, place)
    (folder / place[QUERY]).unlink()
    refused(folder, "which is not there")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "is no index of weight files")


CONFIGS = {
    "unknown-family": ({"model_type": "mamba"}, "model_type=mamba is no family known here, only gpt2, "),
    "images": ({"model_type": "gemma3"}, "it is of text and images"),
    "labels-of-tokens": ({"architectures": ["LlamaForTokenClassification"]}, "only LlamaForCausalLM, a model of language"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised"),
    "activation": ({"hidden_act": "relu"}, "hidden_act=relu is not supported, only silu is"),
    "rope": ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type=proportional is not supported"),
    "rope-word": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 3}},
        "hold beta_fast, which is not supported",
    ),
    "heads": ({"num_attention_heads": 5}, "transformers refuses it"),
    "nonsense": ({"num_hidden_layers": "many"}, "transformers refuses it"),
    "of-other-classes": ({"clip_qkv": 8.0}, "clip_qkv=8.0 is no part of llama here"),
    "no-number": ({"rope_parameters": {"rope_type": "linear", "factor": "4", "rope_theta": 1e4}}, "factor=4.* is no number"),
    "no-fraction": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "half"}},
        "half.* is no number|transformers refuses it",
    ),
    "low-factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}}, r"model\.rope\.factor=0\.5"),
    "another-shape": ({"num_hidden_layers": 2}, "holds unknown model.layers.2"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_our_decoder_does_not_have(case, folder):
    fields, text = CONFIGS[case]
    change_config(folder, **fields)
    refused(folder, text)


@pytest.mark.parametrize(
    ("case", "fields", "text"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true is not supported"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=true is not supported"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "read as model.window_pattern"),
        ("gemma3", {"layer_types": ["full_attention"] * 4}, "a Gemma 3 without sliding_attention"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supported"),
        ("exaone4", {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, "an EXAONE 4 with sliding_window"),
    ],
)
def test_settings_of_single_families(case, fields, text, tmp_path):
    folder = save(build(case), tmp_path / "theirs")
    change_config(folder, **fields)
    refused(folder, text)


def test_a_config_that_is_none(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json: cannot be read")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"hf=\./nowhere: no such folder"):
        hf_import.run(ImportConfig(hf="./nowhere", out=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_a_name_on_the_hub(folder, monkeypatch):
    """The hub itself is elsewhere: what is asked of it, and what becomes of its answers."""
    commit = folder.rename(folder.parent / "0123abc")
    asked = {}

    def given(name, **words):
        asked.update(words, name=name)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", given)
    out = commit.parent / "out"
    assert hf_import.run(ImportConfig(hf="someone/llama", revision="main", out=str(out), proof=False)) == 0
    assert (asked["name"], asked["revision"]) == ("someone/llama", "main")
    names = (
        "model-00001-of-00002.safetensors", "consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors",
        "config.json", "modeling_llama.py", "chat_template.jinja",
    )  # fmt: skip
    allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
    wanted = [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in allowed) and not any(fnmatch(name, pattern) for pattern in ignored)
    ]
    assert wanted == ["model-00001-of-00002.safetensors", "config.json", "chat_template.jinja"]
    origin = CheckpointReader(out).settings.origin
    assert (origin.source, origin.revision) == ("someone/llama", "0123abc")


def test_a_hub_that_gives_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="hf=someone/llama: no such folder, and the hub gave nothing .*no network here"):
        hf_import.run(ImportConfig(hf="someone/llama", out=str(tmp_path / "out"), proof=False))
    assert not list(tmp_path.iterdir())


def test_a_folder_has_no_revision(folder):
    refused(folder, "revision=main: .* is a folder here, and has none", revision="main")


def test_a_checkpoint_of_another_verb_is_not_guessed_at(folder):
    out = run(folder)
    manifest = read_manifest(out)
    with pytest.raises(UserError, match="was written by `distil`, which this program does not know"):
        read_settings(out, replace(manifest, written_by="distil"))
    with pytest.raises(UserError, match="there is no run to go on with; start one from its weights with initial_checkpoint="):
        _ = CheckpointReader(out).config


def test_a_field_that_nobody_has_is_told(folder, capsys):
    change_config(folder, is_my_own=True)
    run(folder)
    assert "note: fields that llama does not have, and transformers ignores too: is_my_own" in capsys.readouterr().err


def test_a_tokenizer_is_needed_and_fits(folder, llama):
    (folder / "tokenizer.json").rename(folder.parent / "kept.json")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer=FOLDER takes that of another folder"):
        run(folder)
    assert not (folder.parent / "out").exists() and not (folder.parent / "out.partial").exists()
    out = run(folder, tokenizer=str(llama))
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_a_tokenizer_with_more_tokens_than_the_model(folder):
    words = [" ".join(f"word{number} thing{number}" for number in range(200))]
    train_tokenizer(TokenizerConfig(vocab_size=320, min_frequency=1), words, folder)
    with pytest.raises(UserError, match="its tokenizer has 320 tokens, the model an embedding of 290"):
        run(folder)
    assert not (folder.parent / "out").exists() and not (folder.parent / "out.partial").exists()


def test_special_tokens_may_lie_beyond_the_embedding(folder):
    """As Gemma 3 has one for images, beyond the rows of its models of text."""
    words = [" ".join(f"word{number} thing{number}" for number in range(200))]
    train_tokenizer(TokenizerConfig(vocab_size=290, min_frequency=1), words, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id("<image>") == 290
    assert CheckpointReader(run(folder)).model.vocab_size == 290


def test_code_in_the_folder_is_never_run(folder):
    mark = folder / "ran"
    code = "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): pass\n"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n{code}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(folder, auto_map={"AutoModelForCausalLM": "mine.Mine"})
    reader = CheckpointReader(run(folder))
    prove_tokenizer(reader.tokenizer_folder, folder)
    open_theirs(folder, reader.model)
    assert not mark.exists()


def test_two_sets_of_weights_are_not_chosen_from(folder):
    weights = (folder / "model.safetensors").read_bytes()
    as_shards(folder)
    (folder / "model.safetensors").write_bytes(weights)
    refused(folder, "which may be other weights; remove one of them")


def test_an_import_into_its_source_is_refused(folder):
    with pytest.raises(UserError, match="is what is read"):
        hf_import.run(ImportConfig(hf=str(folder), out=str(folder), proof=False, overwrite=True))
    assert (folder / "model.safetensors").exists()


def test_a_tied_head_that_lies_in_the_files(tmp_path):
    folder = save(build("llama-tied-llama3"), tmp_path / "theirs")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in CheckpointReader(run(folder)).names
    shutil.rmtree(tmp_path / "out")
    change_weights(folder, lambda weights: weights["lm_head.weight"].add_(1))
    refused(folder, "lm_head.weight is another matrix than model.embed_tokens.weight")


def test_names_of_the_bare_model_and_buffers_of_old(tmp_path):
    """The published files of GPT-2 have no prefix, and hold the masks of attention."""
    folder = save(build("gpt2"), tmp_path / "theirs")
    with_prefix = CheckpointReader(run(folder))
    expected = {name: with_prefix.read(name) for name in with_prefix.names}
    shutil.rmtree(with_prefix.path)
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    } | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(run(folder))
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in expected.items())


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_weights_only_when_asked_for_and_only_tensors(folder, tmp_path):
    expected = CheckpointReader(run(folder))
    values = {name: expected.read(name) for name in expected.names}
    shutil.rmtree(expected.path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin is pickled: weights=bin reads it")
    reader = CheckpointReader(run(folder, weights="bin"))
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in values.items())
    shutil.rmtree(reader.path)

    target = folder / "exploded"
    torch.save({"weight": _Bomb(target)}, folder / "pytorch_model.bin")
    refused(folder, "cannot be read as a file of nothing but tensors", weights="bin")
    assert not target.exists()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    refused(folder, "holds something else than named tensors", weights="bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Bomb(target)}))
    refused(folder, "cannot be read as a file of nothing but tensors", weights="bin")
    assert not target.exists()
