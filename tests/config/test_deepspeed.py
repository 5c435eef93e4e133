"""DeepSpeed files: "auto" is filled in, contradictions and traps are refused."""

import json
from pathlib import Path

import pytest

from ghostvis_mega.config import deepspeed_keys as keys
from ghostvis_mega.config.deepspeed import engine_files, find_problems, resolve_deepspeed
from ghostvis_mega.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


@pytest.fixture
def resolve(make_run, tmp_path):
    """Resolve a file that differs from a right one by the given keys."""

    def resolve(given: dict, *overrides: str, engine="llm", world_size: int = 2):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 1}} | given))
        run = make_run(*overrides)
        return resolve_deepspeed(path, run=run, engine=engine, world_size=world_size)

    return resolve


def test_the_recipe_in_fp32(resolve):
    resolved = resolve({})
    assert resolved.stage == 1
    assert resolved.config == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 10**6,
        },
        "steps_per_print": 10**9,
    }


def test_the_recipe_in_bf16(resolve):
    config = resolve({"zero_optimization": {"stage": 2}}, "train.precision=bf16").config
    assert resolve({"zero_optimization": {"stage": 1}}, "train.precision=bf16").stage == 1
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


def test_what_the_run_says_may_be_repeated_and_what_is_off_may_stay(resolve):
    resolved = resolve(
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "fp16": {"enabled": False},
            "wall_clock_breakdown": False,
            "tensorboard": {"enabled": False},
            "zero_optimization": {
                "stage": 1,
                "overlap_comm": True,
                "reduce_bucket_size": 5e7,
                "allgather_bucket_size": 2e8,
                "offload_optimizer": None,
                "zero_hpz_partition_size": 1,
            },
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.01},
            },
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        }
    )
    assert resolved.config["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": 50_000_000,
    }
    assert "optimizer" not in resolved.config, "ours is handed over as an object"


@pytest.mark.parametrize("pin", [{}, {"pin_memory": True}, {"pin_memory": False}])
def test_the_optimizer_goes_to_the_host(resolve, pin):
    block = {"device": "cpu", "buffer_count": 4, "fast_init": False, "ratio": 1.0, **pin}
    resolved = resolve({"zero_optimization": {"stage": 2, "offload_optimizer": block}})
    assert resolved.offload
    assert resolved.config["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": pin.get("pin_memory", True),
    }
    stays = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
    assert not resolve(stays).offload
    assert "offload_optimizer" not in resolve(stays).config["zero_optimization"]


WRONG = {
    "unknown key": ({"zero_optimisation": {}}, [], "zero_optimisation", "mean zero_optimization?"),
    "unknown zero key": (
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        [],
        "zero_optimization.overlap_com",
        "mean zero_optimization.overlap_comm?",
    ),
    "no stage": ({"zero_optimization": {"stage": 4}}, [], "stage=4", "Use 0, 1, 2 or 3"),
    "batch": ({"train_batch_size": 32}, [], "train_batch_size=32", "batch.global_size=16"),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 4},
        [],
        "train_micro_batch_size_per_gpu=4",
        "batch.micro_size=1",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 8},
        [],
        "gradient_accumulation_steps=8 would divide",
        'Set 1 or "auto"',
    ),
    "clip": ({"gradient_clipping": 0.5}, [], "gradient_clipping=0.5", "optim.clip_norm=1"),
    "fp16": ({"fp16": {"enabled": True}}, [], "fp16.enabled=true", "train.precision=fp32"),
    "bf16 in an fp32 run": (
        {"bf16": {"enabled": True}},
        [],
        "bf16.enabled=true",
        "train.precision=fp32",
    ),
    "fp32 file in a bf16 run": (
        {"bf16": {"enabled": False}, "zero_optimization": {"stage": 2}},
        ["train.precision=bf16"],
        "bf16.enabled=false",
        "train.precision=bf16",
    ),
    "bf16 and stage 0": (
        {"zero_optimization": {"stage": 0}},
        ["train.precision=bf16"],
        "stage=0",
        "Use stage 1 or 2",
    ),
    "bf16 sums": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        [],
        'data_types.grad_accum_dtype="bf16"',
        'Set "fp32"',
    ),
    "bf16 reduction": (
        {"communication_data_type": "bf16"},
        [],
        'communication_data_type="bf16"',
        'Set "fp32"',
    ),
    "stage 3 and pipeline": (
        {"zero_optimization": {"stage": 3}},
        ["parallel.pipeline=2"],
        "stage=3 hangs with parallel.pipeline=2",
        "Use stage 1 or 2",
    ),
    "overlap": (
        {"zero_optimization": {"stage": 3, "overlap_comm": True}},
        [],
        "zero_optimization.overlap_comm=true",
        "Set false",
    ),
    "offload of the parameters": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        [],
        "zero_optimization.offload_param",
        "only the optimizer's go to the host",
    ),
    "offload as it was called": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        [],
        "zero_optimization.cpu_offload=true",
        'offload_optimizer: {"device": "cpu"}',
    ),
    "offload to a disk": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        [],
        'zero_optimization.offload_optimizer.device="nvme"',
        "Use cpu",
    ),
    "offload that is no object": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": True}},
        [],
        "zero_optimization.offload_optimizer=true",
        'Write {"device": "cpu"}',
    ),
    "offload with a typo": (
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "pin_memry": True},
            }
        },
        [],
        "zero_optimization.offload_optimizer.pin_memry ",
        "mean zero_optimization.offload_optimizer.pin_memory?",
    ),
    "offload of a part": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        [],
        "zero_optimization.offload_optimizer.ratio=0.5",
        "Remove it",
    ),
    "offload pinned perhaps": (
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "pin_memory": 1},
            }
        },
        [],
        "zero_optimization.offload_optimizer.pin_memory=1",
        "neither true nor false",
    ),
    "offload of nothing": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        [],
        'zero_optimization.offload_optimizer.device="cpu"',
        "Use stage 1, 2 or 3",
    ),
    "offload while reducing": (
        {
            "zero_optimization": {
                "stage": 1,
                "overlap_comm": True,
                "offload_optimizer": {"device": "cpu"},
            }
        },
        [],
        "zero_optimization.overlap_comm=true",
        "not with offload_optimizer. Set false",
    ),
    "DeepSpeed's optimizer on the host": (
        {"zero_force_ds_cpu_optimizer": True},
        [],
        "zero_force_ds_cpu_optimizer=true",
        "torch's fused AdamW",
    ),
    "zero++": (
        {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
        [],
        "zero_optimization.zero_quantized_gradients=true",
        "Remove it",
    ),
    "no norm": (
        {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
        [],
        "zero_optimization.compute_grad_norm=false",
        "Set true",
    ),
    "whole reduction": (
        {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
        [],
        "zero_optimization.reduce_scatter=false",
        "each rank gets its part",
    ),
    "overflow": (
        {"bf16": {"enabled": "auto", "check_grad_overflow": True}},
        ["train.precision=bf16"],
        "bf16.check_grad_overflow=true",
        "decided once",
    ),
    "optimizer": (
        {"optimizer": {"type": "Lamb", "params": {}}},
        [],
        'optimizer.type="Lamb"',
        "AdamW",
    ),
    "other rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
        [],
        "optimizer.params.lr=0.0003",
        "optim.lr",
    ),
    "scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
        [],
        "scheduler.params=",
        "optim.schedule",
    ),
    "sum for mean": ({"gradient_allreduce_op": "sum"}, [], "gradient_allreduce_op", "Remove it"),
    "no object": ({"zero_optimization": True}, [], "zero_optimization=true", "Write {...}"),
    "no switch": (
        {"zero_optimization": {"stage": 1, "reduce_scatter": "yes"}},
        [],
        "zero_optimization.reduce_scatter",
        "neither true nor false",
    ),
    "no size": (
        {"zero_optimization": {"stage": 1, "allgather_bucket_size": "5e8"}},
        [],
        "zero_optimization.allgather_bucket_size",
        'Set "auto"',
    ),
    "unmanaged": (
        {"managed_gradient_accumulation": False},
        [],
        "managed_gradient_accumulation=false",
        "Remove it",
    ),
    "activation checkpointing": (
        {"activation_checkpointing": {"partition_activations": True}},
        [],
        "activation_checkpointing",
        "train.recompute",
    ),
    "on, as a number": (
        {"wall_clock_breakdown": 1},
        [],
        "wall_clock_breakdown=1",
        "would do nothing. Remove it",
    ),
    "removed": ({"amp": {"enabled": True}}, [], "amp=", "DeepSpeed has removed it"),
}


@pytest.mark.parametrize(("given", "overrides", "field", "fix"), WRONG.values(), ids=WRONG)
def test_a_contradiction_names_key_and_fix(resolve, given, overrides, field, fix):
    with pytest.raises(ConfigError) as error:
        resolve(given, *overrides)
    found = error.value.problems
    assert any(field in text and fix in text for text in found), "\n".join(found)


def test_stage_3_is_refused_for_the_vision_engine_only(resolve):
    stage_3 = {"zero_optimization": {"stage": 3}}
    assert resolve(stage_3).config["zero_optimization"]["overlap_comm"] is False
    with pytest.raises(ConfigError, match="when a rank has no image"):
        resolve(stage_3, engine="vision")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,}', "line 1"),
        ("// zero\n{}", "no comments"),
        ("[]", "one JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"gradient_clipping": NaN}', "NaN is not a number"),
        ('{"bf16": {}, "bf16": {}}', "bf16 appears twice"),
    ],
)
def test_a_broken_file_is_explained(make_run, tmp_path, text, expected):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        resolve_deepspeed(path, run=make_run(), engine="llm", world_size=1)


def test_a_missing_file_is_named_with_its_neighbour(make_run):
    found = find_problems(make_run("deepspeed.llm=ds_configs/zero11.json"), world_size=1)
    assert len(found) == 1 and "deepspeed.llm=ds_configs/zero11.json is not a file" in found[0]
    assert "Did you mean ds_configs/zero1.json?" in found[0]


def test_only_what_is_trained_has_an_engine(make_run):
    assert set(engine_files(make_run())) == {"llm", "vision"}
    assert set(engine_files(make_run("train.freeze=[llm]"))) == {"vision"}
    assert set(engine_files(make_run("train.freeze=[vision, resampler, projector]"))) == {"llm"}
    assert set(engine_files(make_run("model.preset=qwen25_small"))) == {"llm"}


def test_stage_3_of_a_frozen_llm_is_not_silently_ignored(make_run):
    settings = ["train.freeze=[llm]", "deepspeed.vision=ds_configs/zero2.json"]
    run = make_run("deepspeed.llm=ds_configs/zero3.json", *settings)
    (found,) = find_problems(run, world_size=1)
    assert "a frozen LLM has no engine" in found
    assert find_problems(make_run(*settings), world_size=1) == []


SHIPPED = {
    "zero0.json": "fp32",
    "zero1.json": "fp32",
    "zero2.json": "fp32",
    "zero2_bf16.json": "bf16",
    "zero2_offload.json": "bf16",
    "zero3.json": "bf16",
}


@pytest.mark.parametrize(("name", "precision"), SHIPPED.items())
def test_shipped_files_resolve(make_run, name, precision):
    run = make_run(f"train.precision={precision}")
    path = ROOT / "ds_configs" / name
    assert resolve_deepspeed(path, run=run, engine="llm", world_size=1).stage == int(name[4])


def test_all_shipped_files_are_tested():
    assert {path.name for path in (ROOT / "ds_configs").iterdir()} == set(SHIPPED)


def test_known_keys_are_those_of_the_installed_deepspeed():
    """Its own key lists, read as text: importing DeepSpeed costs seconds."""
    import importlib.util

    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    runtime = Path(spec.origin).parent / "runtime"
    zero = (runtime / "zero" / "config.py").read_text(encoding="utf-8")
    for key in sorted(keys.ZERO):
        assert key in zero or key in (runtime / "config.py").read_text(encoding="utf-8"), key
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in runtime.parent.rglob("*.py")
        if path.name in ("config.py", "constants.py", "precision_config.py", "__init__.py")
    )
    for key in sorted(keys.TOP_LEVEL):
        assert f'"{key}"' in sources or f"'{key}'" in sources, key
