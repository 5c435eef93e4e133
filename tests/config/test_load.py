"""Files, overrides and presets become settings, or one report that names every problem."""

from pathlib import Path

import pytest

from ghostvis_mega.config.load import load_run_config, read_run_config
from ghostvis_mega.config.presets import MODEL_PRESETS, TOWER_PRESETS
from ghostvis_mega.config.schema import ModelConfig, RunConfig, VisionConfig
from ghostvis_mega.utils.errors import ConfigError

GOOD = """\
model: {preset: vlm_tiny}
data: {train: datasets/a.gvd, seq_length: 256}
batch: {global_size: 8}
deepspeed: {llm: ds_configs/zero1.json}
train: {steps: 10}
log: {output: runs/x}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def test_values_come_from_preset_file_and_override_in_this_order(good: Path):
    run = load_run_config(
        good, ["model.llm.num_layers=8", "optim.lr.llm=3e-4", "log.preview_steps=[1, 5]"]
    )
    assert run.model.llm.num_layers == 8
    assert run.model.llm.hidden_size == MODEL_PRESETS["vlm_tiny"]["llm"]["hidden_size"]
    assert run.optim.lr.llm == 3e-4
    assert run.log.preview_steps == (1, 5)
    assert run.data.train == Path("datasets/a.gvd"), "relative to the working directory"
    assert MODEL_PRESETS["vlm_tiny"]["llm"]["num_layers"] == 2, "the preset itself is not touched"


def test_a_preset_can_be_replaced_and_emptied_from_the_command_line(good: Path):
    run = load_run_config(
        good, ["model.preset=vlm_7b", "model.vision=null", "model.connector=null"]
    )
    assert run.model.llm.hidden_size == 3584
    assert run.model.vision is None and run.model.modules == ("llm",)


def test_a_tower_preset_replaces_the_models_tower_as_a_whole(good: Path):
    run = load_run_config(
        good, ["model.vision.preset=clip_l_14_336", "model.vision.image_size=224"]
    )
    vision = run.model.vision
    assert vision == VisionConfig(**{**TOWER_PRESETS["clip_l_14_336"], "image_size": 224})
    assert vision is not None and vision.num_patches == 256


def test_a_loaded_run_survives_json(good: Path):
    run = load_run_config(good)
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_presets_are_complete(name: str):
    model = ModelConfig(**MODEL_PRESETS[name])
    llm = model.llm
    assert llm.num_heads % llm.num_kv_heads == 0
    assert llm.num_heads * llm.head_dim == llm.hidden_size
    if model.vision is not None:
        assert model.vision.image_size % model.vision.patch_size == 0
        assert model.tokens_per_image < model.vision.num_patches


def test_qwen_presets_have_the_released_sizes():
    qwen = MODEL_PRESETS["qwen25_7b"]["llm"]
    sizes = [qwen[k] for k in ("num_layers", "hidden_size", "num_heads", "num_kv_heads")]
    assert sizes == [28, 3584, 28, 4]
    assert (qwen["ffn_hidden_size"], qwen["vocab_size"]) == (18944, 152064)
    assert not qwen["tied_embeddings"] and qwen["rope_base"] == 1e6
    tower = VisionConfig(**TOWER_PRESETS["siglip_so400m_14"])
    assert (tower.hidden_size, tower.num_layers, tower.grid) == (1152, 27, 24)


WRONG = [
    (["model.preset=vlm_tny"], "model.preset=vlm_tny", "Did you mean vlm_tiny?"),
    (["model.vision.preset=siglip_b32"], "model.vision.preset", "Did you mean siglip_b_32?"),
    (["data.packng=true"], "data.packng", "Did you mean data.packing?"),
    (["train.clip_norm=1"], "train.clip_norm", "Did you mean optim.clip_norm?"),
    (["train.max_steps=5"], "train.max_steps", "Here it is train.steps."),
    (["optimizer.lr=1"], "optimizer", "Did you mean optim?"),
    (["data.seq_length=many"], "data.seq_length='many'", "whole number"),
    (["data.seq_length=null"], "data.seq_length is empty", "whole number"),
    (["train.steps=true"], "train.steps=True", "Give a number"),
    (["train.steps=0"], "train.steps=0", "at least 1"),
    (["optim.eps=0"], "optim.eps=0", "above 0"),
    (["optim.eps=.nan"], "optim.eps=nan", "finite"),
    (["optim.lr.llm=.inf"], "optim.lr.llm=inf", "finite"),
    (["optim.betas=[0.9]"], "optim.betas", "one more"),
    (["optim.betas=[0.9, 0.95, 0.99]"], "optim.betas", "Give 2"),
    (["train.precision=bfloat16"], "train.precision=bfloat16", "Did you mean bf16?"),
    (["train.freeze=llm"], "train.freeze=llm", "[llm]"),
    (["train.freeze=[lm]"], "train.freeze[0]=lm", "Did you mean llm?"),
    (["log.evaluate=maybe"], "log.evaluate='maybe'", "true or false"),
    (["optim=3"], "optim=3", "its settings below it"),
    (["steps=5"], "steps", "train.steps"),
    (["seq_length"], "'seq_length'", "section.key=value"),
    (["data.train.x=1"], "data.train", "no section"),
    (["data.train=[1"], "data.train", "Quote it"),
    (["model.preset=null", "model.vision=null", "model.connector=null"], "model.llm", "preset"),
]


@pytest.mark.parametrize(("overrides", "field", "fix"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_value_is_named_with_its_fix(good: Path, overrides, field, fix):
    with pytest.raises(ConfigError) as error:
        load_run_config(good, overrides)
    assert any(field in text and fix in text for text in error.value.problems), error.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("model: {preset: [\n", "line 2"),
        ("\tmodel: 1\n", "line 1"),
        (GOOD + "train: {steps: 5}\n", "line 7: the key train appears twice"),
        ("model: {preset: vlm_tiny}\n", "section data is missing"),
        ("model: &m {llm: *m}\n", "contains itself"),
        (
            "a: &a [" + "1," * 99 + "]\nb: &b [" + "*a," * 99 + "]\nc: [" + "*b," * 99 + "]",
            "unfolds",
        ),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("on: {1: 2}\n", "True is not a setting"),
        ("x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_broken_file_is_explained(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load_run_config(path)


def test_a_missing_file_is_named_with_its_neighbour(good: Path):
    with pytest.raises(ConfigError, match=r"Did you mean .*run\.yaml"):
        load_run_config(good.with_name("runs.yaml"))


def test_one_report_holds_all_problems_and_the_rest_stays_usable(good: Path):
    loaded = read_run_config(good, ["data.packng=1", "train.steps=0", "optim.clip_norm=-1"])
    assert len(loaded.problems) == 3
    assert loaded.config is not None and loaded.config.batch.global_size == 8
    said = ["train.steps=1 is short.", "batch.global_size=8 is odd."]
    assert loaded.keep_sound(said) == said[1:], "a stand-in's value is not spoken of"


@pytest.mark.parametrize(
    ("override", "hidden"),
    [
        ("model.preset=vlm_tny", "model"),
        ("model.vision.kind=dino", "model.vision.kind"),
        ("data=null", "data"),
        ("deepspeed=ds.json", "deepspeed"),
    ],
)
def test_even_a_broken_section_leaves_the_others_usable(good: Path, override: str, hidden: str):
    loaded = read_run_config(good, [override])
    assert len(loaded.problems) == 1, loaded.problems
    assert loaded.config is not None and loaded.config.train.steps == 10
    assert hidden in loaded.broken
    assert loaded.keep_sound([f"{hidden}.x=1 is short.", f"{hidden}=2."]) == []


def test_a_section_with_all_keys_commented_out_means_its_defaults(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "parallel:\n  # tensor: 2\n", encoding="utf-8")
    assert load_run_config(path).parallel.tensor == 1
