"""Every rule between settings names the field and the fix; right runs hear of none."""

import pytest

from ghostvis_mega.config.rules import find_notes, find_problems

TWO_STAGES = ("parallel.pipeline=2",)
INTERLEAVED = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")

FOUR_STAGES = ("parallel.pipeline=4", "model.llm.num_layers=8")

GOOD = [
    ([], 1),
    ([], 4),
    (["parallel.tensor=2"], 4),
    (["parallel.pipeline=4", "model.llm.num_layers=4"], 4),
    ([*INTERLEAVED, "model.llm.num_layers=4"], 4),
    ([*TWO_STAGES, "model.llm.num_layers=4", "parallel.first_stage_layers=3"], 4),
    ([*INTERLEAVED, "model.llm.num_layers=6", "parallel.last_stage_layers=2"], 4),
    ([*FOUR_STAGES, "parallel.first_stage_layers=1", "parallel.last_stage_layers=1"], 4),
    (["data.packing=false", "batch.micro_size=4"], 4),
    (["train.precision=bf16"], 1),
    (["tower.window=2", "parallel.tensor=2"], 4),
    (["train.freeze=[llm, vision]"], 2),
    (["model.connector.kind=mlp", "model.connector.tokens_per_image=null"], 2),
    (["model.connector.kind=avgpool_mlp", "model.connector.tokens_per_image=64"], 2),
    (["model.vision=null", "model.connector=null"], 2),
    (["model.preset=nanochat_original"], 2),
    (["log.evaluate=true", "log.preview_steps=[0, 100]"], 1),
]


@pytest.mark.parametrize(("overrides", "world"), GOOD, ids=lambda v: str(v)[:50])
def test_right_runs_have_no_problems(make_run, overrides, world):
    assert find_problems(make_run(*overrides), world_size=world, device="cpu") == []


@pytest.mark.parametrize("preset", ["vlm_small", "vlm_1_5b", "vlm_7b", "qwen25_small", "qwen25_7b"])
def test_presets_are_right_on_a_node(make_run, preset):
    run = make_run(f"model.preset={preset}", "data.seq_length=2048")
    assert find_problems(run, world_size=8, device="cuda") == []


# overrides, processes, the field the sentence names, the fix it offers
WRONG = {
    "heads not shared evenly": (
        ["model.llm.num_heads=6", "model.llm.num_kv_heads=4"],
        1,
        "model.llm.num_kv_heads=4 does not divide model.llm.num_heads=6",
        "Use 1, 2, 3 or 6",
    ),
    "odd head": (["model.llm.head_dim=33"], 1, "model.llm.head_dim=33", "Use 34"),
    "image size": (["model.vision.image_size=6"], 1, "model.vision.image_size=6", "Use at least 8"),
    "windows without pictures": (
        ["model.vision=null", "model.connector=null", "tower.window=2"],
        1,
        "tower.window=2",
        "Set tower.window: 0",
    ),
    "windows in a pipeline": (
        [*TWO_STAGES, "model.llm.num_layers=4", "tower.window=2"],
        4,
        "tower.window=2",
        "Set tower.window: 0",
    ),
    "tower heads": (["model.vision.num_heads=7"], 1, "model.vision.num_heads=7", "1, 2, 4"),
    "feature layer": (
        ["model.vision.feature_layer=-9"],
        1,
        "model.vision.feature_layer=-9",
        "Use -1 (last) to -2",
    ),
    "feature layer from the start": (
        ["model.vision.feature_layer=2"],
        1,
        "model.vision.feature_layer=2",
        "Use -1 (last) to -2",
    ),
    "post norm of an inner layer": (
        ["model.vision.post_norm=true", "model.vision.feature_layer=-2"],
        1,
        "model.vision.post_norm=true",
        "feature_layer: -1",
    ),
    "no connector": (["model.connector=null"], 1, "model.vision is given", "Add model.connector"),
    "no tower": (["model.vision=null"], 1, "model.connector is given", "Add model.vision"),
    "mlp with a number of tokens": (
        ["model.connector.kind=mlp"],
        1,
        "model.connector.tokens_per_image=16",
        "Set it to null",
    ),
    "perceiver without": (
        ["model.connector.tokens_per_image=null"],
        1,
        "model.connector.tokens_per_image is missing",
        "Set it",
    ),
    "pooling to no square": (
        ["model.connector.kind=avgpool_mlp", "model.connector.tokens_per_image=60"],
        1,
        "model.connector.tokens_per_image=60 is no square",
        "Use 1, 4, 16 or 64",
    ),
    "pooling to no divisor": (
        ["model.connector.kind=avgpool_mlp", "model.connector.tokens_per_image=9"],
        1,
        "model.connector.tokens_per_image=9 cannot be pooled",
        "Use 1, 4, 16 or 64",
    ),
    "perceiver heads": (
        ["model.connector.kind=perceiver_mlp", "model.connector.num_heads=3"],
        1,
        "model.connector.num_heads=3",
        "Use one of 1, 2, 4",
    ),
    "sequence too long": (
        ["data.seq_length=1024"],
        1,
        "data.seq_length=1024 exceeds model.llm.max_positions=512",
        "Use at most that",
    ),
    "no room beside an image": (["data.seq_length=20"], 1, "data.seq_length=20", "at least 32"),
    "context parallel": (
        ["parallel.context=2", "data.seq_length=510"],
        2,
        "data.seq_length=510 is no multiple of 4: parallel.context=2",
        "Use 512",
    ),
    "context and sequence parallel": (
        ["parallel.context=2", "parallel.tensor=2", "data.seq_length=330"],
        4,
        "data.seq_length=330 is no multiple of 4",
        "Use 332",
    ),
    "alignment of fewer ranks": (
        ["parallel.context=4", "data.segment_align=4"],
        4,
        "data.segment_align=4 is no multiple of 8: parallel.context=4",
        "Use 8",
    ),
    "alignment without packing": (
        ["data.packing=false", "data.segment_align=4"],
        1,
        "data.segment_align=4 pads the samples of a pack, but data.packing=false",
        "Remove it",
    ),
    "world": (["parallel.tensor=2"], 3, "does not divide the world of 3", "a multiple of 2"),
    "interleaving one stage": (
        ["parallel.virtual_pipeline=2"],
        1,
        "parallel.virtual_pipeline=2",
        "Set virtual_pipeline: 1",
    ),
    "tensor and heads": (
        ["parallel.tensor=4", "model.llm.num_heads=6"],
        4,
        "parallel.tensor=4 does not divide model.llm.num_heads=6",
        "Use 1 or 2",
    ),
    "tensor and kv heads": (
        ["parallel.tensor=3"],
        3,
        "parallel.tensor=3 does not divide model.llm.num_kv_heads=2",
        "change num_kv_heads",
    ),
    "tensor and ffn": (
        ["parallel.tensor=2", "model.llm.ffn_hidden_size=511"],
        2,
        "parallel.tensor=2 does not divide model.llm.ffn_hidden_size=511",
        "change ffn_hidden_size",
    ),
    "tensor and vocabulary": (
        ["parallel.tensor=2", "model.llm.vocab_size=501"],
        2,
        "parallel.tensor=2 does not divide model.llm.vocab_size=501",
        "change vocab_size",
    ),
    "sequence parallel": (
        ["parallel.tensor=2", "data.seq_length=255"],
        2,
        "data.seq_length=255",
        "Use 256",
    ),
    "layers": (
        ["parallel.pipeline=3", "model.llm.num_layers=4"],
        3,
        "parallel.pipeline=3 does not divide model.llm.num_layers=4",
        "1, 2 or 4",
    ),
    "layers of chunks": (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=4", "model.llm.num_layers=4"],
        2,
        "parallel.virtual_pipeline=4 does not divide model.llm.num_layers=4",
        "1, 2 or 4",
    ),
    "an uneven stage of one": (
        ["parallel.first_stage_layers=2"],
        1,
        "parallel.first_stage_layers=2 sets a stage apart, but parallel.pipeline=1",
        "Leave it out",
    ),
    "two ends that are not the whole": (
        [
            *TWO_STAGES,
            "model.llm.num_layers=4",
            "parallel.first_stage_layers=1",
            "parallel.last_stage_layers=2",
        ],
        2,
        "parallel.last_stage_layers=2 make 3 layers, but model.llm.num_layers=4",
        "Leave one of the two out",
    ),
    "uneven rest": (
        [*FOUR_STAGES, "parallel.first_stage_layers=1"],
        4,
        "parallel.first_stage_layers=1 leaves 7 of model.llm.num_layers=8 for the other 3 of 4",
        "Leave a multiple of 3",
    ),
    "no rest": (
        [*FOUR_STAGES, "parallel.first_stage_layers=5", "parallel.last_stage_layers=3"],
        4,
        "leave 0 of model.llm.num_layers=8 for the other 2 of 4 stages",
        "Leave a multiple of 2",
    ),
    "uneven chunks": (
        [*INTERLEAVED, "model.llm.num_layers=6", "parallel.first_stage_layers=3"],
        2,
        "parallel.first_stage_layers=3: stages of 3 layers",
        "Give every stage a multiple of 2 layers",
    ),
    "packs of several rows": (["batch.micro_size=2"], 1, "batch.micro_size=2", "micro_size: 1"),
    "batch and replicas": (["batch.global_size=15"], 2, "batch.global_size=15", "Use 14 or 16"),
    "batch below one round": (["batch.global_size=3"], 4, "batch.global_size=3", "Use 4."),
    "interleaving needs whole rounds": (
        [*INTERLEAVED, "batch.global_size=6"],
        4,
        "batch.global_size=6 gives 3 micro-batches",
        "Use batch.global_size=8",
    ),
    "augment without pictures": (
        ["model.preset=qwen25_small", "data.augment=true"],
        1,
        "data.augment=true",
        "Set it to false",
    ),
    "frozen twice": (["train.freeze=[llm, llm]"], 1, "train.freeze names llm 2 times", "Keep one"),
    "frozen and absent": (
        ["train.freeze=[resampler]", "model.connector.kind=avgpool_mlp"],
        1,
        "train.freeze names resampler",
        "model.connector.kind=avgpool_mlp",
    ),
    "all frozen": (
        ["train.freeze=[llm, vision, resampler, projector]"],
        1,
        "freezes everything",
        "Leave out at least one",
    ),
    "vision engine for a text model": (
        ["model.preset=qwen25_small", "deepspeed.vision=ds_configs/zero2.json"],
        1,
        "deepspeed.vision=ds_configs/zero2.json",
        "Remove it",
    ),
    "rate zero": (["optim.lr.vision=0"], 1, "optim.lr.vision=0", "train.freeze"),
    "warmup": (["optim.warmup_steps=100"], 1, "optim.warmup_steps=100", "Use fewer than 100"),
    "beta one": (["optim.betas=[0.9, 1.0]"], 1, "optim.betas[1]=1", "any below 1"),
    "accuracy without questions": (
        ["log.evaluate=true", "data.heldout=null"],
        1,
        "log.evaluate=true",
        "Set data.heldout",
    ),
    "previews without samples": (
        ["log.preview_steps=[5]", "data.heldout=null"],
        1,
        "log.preview_steps=[5]",
        "Set data.heldout",
    ),
    "previews after the end": (
        ["log.preview_steps=[5, 500]"],
        1,
        "log.preview_steps=[500]",
        "up to 100",
    ),
    "previews of nothing": (
        ["log.preview_steps=[5]", "log.preview_samples=0"],
        1,
        "log.preview_samples=0",
        "Use 8",
    ),
    "no gpu": (["train.device=cuda"], 1, "train.device=cuda", "train.device: auto"),
    "no gpu to share": (["train.ranks_per_gpu=2"], 2, "train.ranks_per_gpu=2", "Leave it out"),
}


@pytest.mark.parametrize(("overrides", "world", "field", "fix"), WRONG.values(), ids=WRONG)
def test_a_broken_rule_names_field_and_fix(make_run, overrides, world, field, fix):
    found = find_problems(make_run(*overrides), world_size=world, device="cpu")
    assert any(field in text and fix in text for text in found), "\n".join(found)


def test_a_fused_tower_has_widths_for_its_kernels(make_run):
    narrow = ("train.precision=bf16", "model.vision.ffn_hidden_size=196")
    (found,) = find_problems(make_run(*narrow), world_size=1, device="cuda")
    assert "model.vision.ffn_hidden_size=196" in found and "tower.fused: false" in found
    for run, device in (
        (make_run(*narrow), "cpu"),
        (make_run(*narrow, "tower.fused=false"), "cuda"),
        (make_run(narrow[1]), "cuda"),
        (make_run(narrow[0], "model.vision.ffn_hidden_size=200"), "cuda"),
    ):
        assert not any(
            "tower.fused" in text for text in find_problems(run, world_size=1, device=device)
        )


def test_held_out_data_must_be_other_data(make_run):
    train = make_run().data.train
    (found,) = find_problems(make_run(f"data.heldout={train}"), world_size=1, device="cpu")
    assert found.startswith(f"data.heldout={train} is data.train")


def test_all_problems_come_at_once_and_once_each(make_run):
    run = make_run(
        "parallel.tensor=4",
        "model.llm.num_heads=6",
        "model.vision.image_size=6",
        "optim.warmup_steps=200",
    )
    found = find_problems(run, world_size=4, device="cpu")
    assert len(found) == 4 and len(set(found)) == 4


def test_notes_speak_of_what_surprises(make_run):
    run = make_run("parallel.pipeline=4", "batch.global_size=4", "optim.clip_norm=0")
    notes = find_notes(run, world_size=4)
    assert [n.split(" ")[0] for n in notes] == ["The", "optim.clip_norm=0:"]
    assert find_notes(make_run(), world_size=4) == []
    run = make_run("train.precision=bf16", "train.fp8=tensorwise")
    (note,) = find_notes(run, world_size=1)
    assert note.startswith("train.fp8=tensorwise with data.packing=true")
    run = make_run("model.vision.image_size=60", "model.connector.tokens_per_image=49")
    assert find_problems(run, world_size=1, device="cpu") == []
    (note,) = find_notes(run, world_size=1)
    assert "the last 4 pixels to the right and below" in note and note.endswith("none left.")
    assert " 56 has the same patches" in note
