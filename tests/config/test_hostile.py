"""Whatever stands in the files, the answer is a report, never a traceback."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import ConfigError

pytestmark = pytest.mark.durability

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    10**30,
    float("nan"),
    "",
    "auto",
    "llm",
    "../x",
    [],
    [1],
    [None],
    {},
    {"a": 1},
    {1: 2},
]
DEEPSPEED = {
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "data_types": {"grad_accum_dtype": "fp32"},
}


def places(section: dict, above: tuple = ()) -> Iterator[tuple]:
    for key, value in section.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def mutate(settings: dict, rng: random.Random) -> dict:
    """A copy with up to three values replaced, removed or added."""
    settings = copy.deepcopy(settings)
    for _ in range(rng.randint(1, 3)):
        *above, key = rng.choice(list(places(settings)) or [("model",)])
        section = settings
        for name in above:
            section = section[name]
        action = rng.random()
        if action < 0.2:
            section.pop(key, None)
        elif action < 0.4:
            section[rng.choice([1, None, "zz", "preset"])] = copy.deepcopy(rng.choice(VALUES))
        else:
            section[key] = copy.deepcopy(rng.choice(VALUES))
    return settings


@pytest.mark.parametrize("seed", range(2))
def test_mutated_files_end_in_a_report(run_file, tmp_path, seed: int):
    rng = random.Random(seed)
    right = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    right["model"] |= {"vision": {"preset": "siglip_b_32"}, "llm": {"num_layers": 4}}
    right["deepspeed"] = {"llm": str(tmp_path / "ds.json")}
    outcomes = {"report": 0, "right": 0}
    for _ in range(60):
        both = rng.random()
        run = mutate(right, rng) if both < 0.7 else right
        file = mutate(DEEPSPEED, rng) if both > 0.3 else DEEPSPEED
        (tmp_path / "ds.json").write_text(json.dumps(file), encoding="utf-8")
        run_file.write_text(yaml.safe_dump(run), encoding="utf-8")
        try:
            load_checked(run_file, world_size=rng.choice([1, 2, 3]), device="cpu")
            outcomes["right"] += 1
        except ConfigError as error:
            assert error.problems and all(error.problems)
            outcomes["report"] += 1
    # Some changes are harmless; if none were, everything would be refused for another reason.
    assert outcomes["report"] > 20 and outcomes["right"] > 0, outcomes
