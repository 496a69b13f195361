"""From words to a frozen configuration, and what a wrong word is told: field, value, rule, way out, all at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conf.compose import CONF_FOLDER, compose, groups, options, read_config, to_plain, validate, write_config
from conf.errors import ConfigError, UserError
from conf.schema import dataclass_in, leaf_names, nearest
from data_pipeline.config import PrepareConfig
from slurm.config import SubmitConfig
from tests.timeouts import scaled
from tests.unit.config.words import ENOUGH, FINETUNE, pretrain_config, problems_of
from train.config.evaluation import EvaluationConfig
from train.config.finetune import FinetuneConfig
from train.config.pretrain import PretrainConfig

ROOTS = {
    "pretrain": (PretrainConfig, ENOUGH),
    "prepare": (PrepareConfig, ["corpus.paths=[/somewhere]", "tokenizer.path=/t"]),
    "submit": (SubmitConfig, []),
    "evaluate": (EvaluationConfig, ["checkpoint=runs/a"]),
    "finetune": (FinetuneConfig, FINETUNE),
}
OF_THE_USER = {  # what an option leaves open on purpose
    "task/harness.yaml": ["task.tasks=[arc_easy]"],
    "task/classification.yaml": ["task.data=[{path: a.tsv}]", "task.prompt='{text}'", "task.labels=[a,b]"],
    **{
        f"task/{name}.yaml": ["task.data=[{path: a.tsv}]"]
        for name in ("answers", "dialogue", "generation", "preference", "summarisation", "translation")
    },
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optm.lr=3"], "optm.lr: unknown key. Did you mean optim.lr?"),
        (["model.num_layer=3"], "model.num_layer: unknown key. Did you mean model.num_layers?"),
        (["sequence_length=64"], "sequence_length: unknown key. Did you mean data.sequence_length?"),
        (["qqqq=3"], "qqqq: unknown key. --help lists the fields"),
        (["data.sources=[{path: y, pth: x}]"], "data.sources[0].pth: unknown key. Did you mean data.sources[].path?"),
        (["data.sources=[{weight: 2}]"], "data.sources[0].path: needs a value"),
        (["~model"], "model: needs a value; give model=..."),
        (["model=null"], "model: needs a value; give model=..."),
        (["model.num_layers=many"], "model.num_layers=many: must be a whole number"),
        (["batch.sequences=1.5"], "batch.sequences=1.5: must be a whole number"),
        (["model.num_layers=null"], "model.num_layers=null: must be a whole number"),
        (["model.num_kv_heads=none"], "model.num_kv_heads=none: must be a whole number or null"),
        (["batch.sequences=true"], "batch.sequences=true: must be a whole number"),
        (["data.sources=[{path: a, weight: true}]"], "data.sources[0].weight=true: must be a number"),
        (["optim.lr=quick"], "optim.lr=quick: must be a number"),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite number"),
        (["optim.lr=inf"], "optim.lr=inf: must be a finite number"),
        (["optim.grad_clip=false"], "optim.grad_clip=false: must be a number or null"),
        (["model.bias=3"], "model.bias=3: must be true or false"),
        (["run.name=5"], """run.name=5: must be text; quote it twice, for the shell and for YAML: run.name="'5'\""""),
        (["run.notes=null"], "run.notes=null: must be text"),
        (["precision=fp16"], "precision=fp16: must be auto, bf16, fp32 or fp8"),
        (["schedule.kind=cosin"], "must be cosine, wsd, linear, constant or inverse_sqrt; did you mean cosine?"),
        (["data.sources=x"], "data.sources=x: must be a list, which is given as a whole: data.sources=[{path: ...}]"),
        (["data.sources.0.weight=2"], "must be a list, which is given as a whole: data.sources=[{path: ...}]"),
        (["data.sources=[x]"], "data.sources[0]=x: must be written {path: ...}, with further fields if need be"),
        (
            ["monitor.wandb.tags=[1]"],
            """quote it, and the whole for the shell: "monitor.wandb.tags=['1', ...]\"""",
        ),
        (["monitor.wandb.tags=a"], "monitor.wandb.tags=a: must be a list, which is given as a whole: monitor.wandb.tags=[A,B]"),
        (["run=x"], "run=x: is a section, not a value; set its fields, such as run.name=..."),
        (["model=llama_160"], "model=llama_160: no such option. Did you mean llama_160m? There are: "),
        (["experiment=quickstar"], "experiment=quickstar: no such option. Did you mean quickstart? There are:"),
        (["corpus=stdlib"], "corpus=stdlib: pretrain has no group corpus; the groups here are model, optim,"),
        (["optim.lr"], "optim.lr: not understood; settings are given as name=value"),
        (["=3"], "=3: not understood; settings are given as name=value"),
        (["run.notes=it's"], """quoted twice, for the shell and for YAML: run.notes="'a, b'\""""),
        (["data.sources=[{path: x"], "and quoted for the shell as a whole: 'data.sources=[...]'"),
        (["hydra.run.dir=/x"], "hydra.run.dir=/x: Hydra itself has no settings here; leave it out"),
        (["optim.lr=1e-3,3e-3"], "optim.lr=1e-3,3e-3: several values need -m, which runs one job for each; a list is written"),
        (["model=llama_tiny,llama_mini"], "model=llama_tiny,llama_mini: several values need -m"),
        (["run.seed=range(1,4)"], "run.seed=range(1,4): several values need -m"),
        (["run.name=${oc.env:LONGHAUL_NO_SUCH}"], 'run.name: KeyError raised while resolving interpolation: "Environment'),
        (["run.name=${optim.no_such}"], "run.name: Interpolation key 'optim.no_such' not found"),
        (["~optim.no_such"], "'optim.no_such' does not exist"),
    ],
)
def test_a_wrong_word_is_told_alone(words: list[str], expected: str) -> None:
    problems = problems_of([*ENOUGH, *words])
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_all_problems_are_told_at_once() -> None:
    words = ["optm.lr=3", "model.hidden_size=abc", "batch.sequences=-4", "parallel.zero=0", "optim.lr=1,2", "schedule=wds"]
    words += ["data.sequence_length", "optim.beta1=7", "run.notes=it's"]
    problems = problems_of([*ENOUGH, *words])
    beginnings = (
        "optm.lr:", "model.hidden_size=abc:", "batch.sequences=-4:", "parallel.zero=0:", "optim.lr=1,2:", "schedule=wds:",
        "data.sequence_length:", "optim.beta1=7.0:", "run.notes=it's:",
    )  # fmt: skip
    assert len(problems) == len(beginnings)
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in problems), f"{beginning} is missing in {problems}"


def test_error_text_counts_and_lists() -> None:
    assert str(ConfigError(["a", "b"])) == "the configuration has 2 problems:\n  - a\n  - b"
    assert str(ConfigError(["a"])) == "the configuration has 1 problem:\n  - a"


def test_unknown_experiment_is_not_buried_under_what_it_would_have_set() -> None:
    problems = problems_of(["experiment=nope", "optim.lr"])
    assert [problem.partition(":")[0] for problem in problems] == ["experiment=nope", "optim.lr"]


def test_faulty_sweep_is_checked_with_its_first_value() -> None:
    assert len(problems_of(["model=llama_mini", "budget.steps=1000,2000", "data.sequence_length=64"])) == 1


def test_adding_a_group_that_is_there_chooses_it() -> None:
    assert pretrain_config("+model=llama_mini").model.num_layers == 6


def test_no_experiment_is_none() -> None:
    assert pretrain_config("experiment=null") == pretrain_config()


def test_removed_group_leaves_the_dataclass_defaults() -> None:
    from train.config.training import ScheduleConfig

    assert pretrain_config("~schedule").schedule == ScheduleConfig()


def test_fields_that_no_yaml_mentions_can_be_set() -> None:
    config = pretrain_config("checkpoint.keep_last=7", "optim.epsilon=1e-6", "budget.steps=3e3")
    assert (config.checkpoint.keep_last, config.optim.epsilon, config.budget.steps) == (7, 1e-6, 3000)


def test_quoted_text_arrives_as_it_is() -> None:
    assert pretrain_config("run.notes='a, b = [c]'").run.notes == "a, b = [c]"


@pytest.mark.parametrize(
    "text", ["def main(", "one, two", "it's", "a=b", "${x}", "[1", "5", " ", 'say "hi"', "two\nlines", "~", ""]
)
def test_verbatim_field_takes_any_text(text: str) -> None:
    words = ["checkpoint=runs/a", f"prompt={text}"]
    assert compose("generate", words, verbatim=("prompt",)).tree["prompt"] == text
    composed = compose("evaluate", ["task=translation", f"task.prompt={text}"], verbatim=("task.prompt",))
    assert composed.tree["task"]["prompt"] == text and composed.tree["task"]["name"] == "translation"


@pytest.mark.parametrize(("word", "value"), [("prompt=null", None), ("prompt='5, 6'", "5, 6"), ('prompt="a"', "a")])
def test_verbatim_field_still_knows_null_and_quotes(word: str, value: str | None) -> None:
    assert compose("generate", ["checkpoint=runs/a", word], verbatim=("prompt",)).tree["prompt"] == value


# --- the user's own groups


@pytest.fixture
def own_groups(tmp_path: Path) -> Path:
    folder = tmp_path / "my, own=groups"  # what Hydra's grammar would trip over
    (folder / "model").mkdir(parents=True)
    text = (CONF_FOLDER / "model/llama_tiny.yaml").read_text()
    (folder / "model/mine.yaml").write_text(text.replace("num_layers: 4", "num_layers: 5"))
    return folder


def test_config_dir_brings_a_model(own_groups: Path) -> None:
    words = [*ENOUGH, "model=mine"]
    assert validate(PretrainConfig, compose("pretrain", words, str(own_groups))).model.num_layers == 5
    assert "mine" in options("model", str(own_groups)) and "llama_8b" in options("model", str(own_groups))
    with pytest.raises(ConfigError, match="model=mine: no such option"):
        validate(PretrainConfig, compose("pretrain", words))


def test_relative_config_dir(own_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_groups.parent)
    assert compose("pretrain", ["model=mine"], own_groups.name).tree["model"]["num_layers"] == 5


def test_config_dir_that_hides_one_of_ours_is_refused(own_groups: Path) -> None:
    (own_groups / "model/llama_8b.yaml").write_text("family: llama\n")
    with pytest.raises(ConfigError, match=r"model/llama_8b.yaml has the name of an option of Longhaul's own; give the file"):
        compose("pretrain", ["model=mine"], str(own_groups))


def test_config_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--config-dir={tmp_path}/no: no such folder"):
        compose("pretrain", [], f"{tmp_path}/no")


def test_broken_yaml_of_the_user_is_named(own_groups: Path) -> None:
    (own_groups / "model/broken.yaml").write_text("family: [llama\nnum_layers: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        compose("pretrain", ["model=broken"], str(own_groups))


def test_wrong_field_in_the_users_yaml_is_named(own_groups: Path) -> None:
    (own_groups / "model/odd.yaml").write_text("defaults: [mine]\nnum_layer: 3\n")
    with pytest.raises(ConfigError, match=r"model.num_layer: unknown key. Did you mean model.num_layers\?"):
        validate(PretrainConfig, compose("pretrain", ["model=odd", "budget.steps=1000"], str(own_groups)))


# --- every YAML file of ours


def yaml_files() -> list[str]:
    return sorted(path.relative_to(CONF_FOLDER).as_posix() for path in CONF_FOLDER.glob("*/*.yaml"))


def root_of(group: str, text: str = "") -> str:
    """The verb that draws from the group; of an experiment the one whose groups it chooses from."""
    if group == "experiment" and "/task:" in text:
        return "finetune"
    return next(root for root in ROOTS if group in groups(root))


@pytest.mark.parametrize("file", yaml_files())
def test_every_option_composes_and_validates(file: str) -> None:
    group, option = file.removesuffix(".yaml").split("/")
    root = root_of(group, (CONF_FOLDER / file).read_text())
    schema, given = ROOTS[root]
    if group == "experiment":
        given = (
            ["+model=llama_tiny"] if root == "finetune" else []
        )  # it needs nothing beside itself, and the checkpoint's model
    words = [*(word for word in given if not word.startswith(f"{group}=")), *OF_THE_USER.get(file, [])]
    validate(schema, compose(root, [f"{group}={option}", *words]))


@pytest.mark.parametrize("file", yaml_files())
def test_every_leaf_of_an_option_is_a_field(file: str) -> None:
    group = file.partition("/")[0]
    schema = ROOTS[root_of(group, (CONF_FOLDER / file).read_text())][0]
    is_whole = "# @package _global_" in (CONF_FOLDER / file).read_text()
    section = schema if is_whole else dataclass_in(_hints(schema)[group])
    tree = yaml.safe_load((CONF_FOLDER / file).read_text())
    tree.pop("defaults", None)
    unknown = set(_leaves(tree)) - set(leaf_names(section))
    assert not unknown, f"{file}: {unknown} are no fields of {section.__name__}"


def test_every_group_is_drawn_by_a_root() -> None:
    for folder in CONF_FOLDER.iterdir():
        if any(folder.glob("*.yaml")):
            assert root_of(folder.name)


def _hints(schema: type) -> dict:
    import typing

    return typing.get_type_hints(schema)


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    nested = [(f"{prefix}{key}", value) for key, value in tree.items()]
    return [leaf for name, value in nested for leaf in (_leaves(value, f"{name}.") if isinstance(value, dict) else [name])]


# --- to disk and back


@pytest.mark.parametrize(
    "words", [[], ["optim.lr=0.1", "data.sources=[{path: a, weight: 0.3},{path: b}]", "run.notes='ü: [1, null]'"]]
)
def test_written_and_read_is_the_same(words: list[str], tmp_path: Path) -> None:
    config = pretrain_config(*words)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(PretrainConfig, tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text", ["1", "null", "1e3", "true", "2024-01-01", "~", "a: b", "#x", " ", "0x1f", "NaN", "line\nbreak"]
)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    config = dataclasses.replace(pretrain_config(), run=dataclasses.replace(pretrain_config().run, notes=text))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(PretrainConfig, tmp_path / "config.yaml").run.notes == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read (No such file or directory); is it the folder of a run?"),
        (b"", "damaged, it holds no settings"),
        (b"run: [", "damaged, it is not YAML"),
        (b"\xff\xfe", "damaged, it is not YAML"),
        (b"model: 3", "model=3: is a section"),
    ],
)
def test_damaged_config_file_is_named(content: bytes | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_config(PretrainConfig, path)
    assert text in str(caught.value) and f"{path}: " in str(caught.value)


def test_plain_form_is_yaml_safe_and_complete() -> None:
    every_section = ("model.family=custom", "model.window=8", "model.local_rope.base=500")  # this one may be null
    plain = to_plain(pretrain_config(*every_section))
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert set(_leaves(plain)) == set(leaf_names(PretrainConfig))


def test_configuration_is_frozen_to_the_leaves() -> None:
    def parts(config: object) -> list[object]:
        values = [getattr(config, field.name) for field in dataclasses.fields(config)]
        inner = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return [config, *(part for item in inner if dataclasses.is_dataclass(item) for part in parts(item))]

    for part in [*parts(pretrain_config()), *parts(PrepareConfig())]:
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
        assert not [f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), list | dict | set)]


def test_composing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain_config()
    assert not list(tmp_path.iterdir())


def test_nearest_prefers_the_whole_name() -> None:
    assert nearest("optim.lrr", ["model.lr", "optim.lr"]) == " Did you mean optim.lr?"
    assert nearest("qqq", ["model.lr"]) == ""


def test_composing_and_planning_imports_nothing_heavy() -> None:
    heavy = ("torch", "deepspeed", "megatron", "transformers", "tokenizers", "datasets", "wandb", "safetensors", "pyarrow")
    code = f"""
import sys
from conf.compose import compose, validate
from train.config.pretrain import PretrainConfig
from train.plan import describe, make_plan
from dataclasses import replace
config = validate(PretrainConfig, compose("pretrain", ["model=llama_8b", "budget.steps=1000"]))
describe(make_plan(config, 8), config, precision="bf16")
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=scaled(60))
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "lr"),
    [
        (["task=dialogue"], 2e-5),
        (["task=preference"], 1e-6),
        (["task=preference", "method=lora"], 1e-5),
        (["task=preference", "method=lora", "optim.lr=3e-5"], 3e-5),
    ],
)
def test_rates_follow_from_the_task_and_the_method(words: list[str], lr: float) -> None:
    assert compose("finetune", [*FINETUNE, *words]).tree["optim"]["lr"] == lr


def test_rates_of_a_task_of_ones_own_are_those_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "pairs.yaml").write_text("defaults: [preference]\nname: pairs\n")
    words = [word for word in FINETUNE if not word.startswith("task")]
    for method, lr in (("full", 1e-6), ("lora", 1e-5)):
        composed = compose("finetune", [*words, "task=pairs", f"method={method}"], str(tmp_path))
        assert composed.tree["optim"]["lr"] == lr and composed.tree["task"]["name"] == "pairs"
