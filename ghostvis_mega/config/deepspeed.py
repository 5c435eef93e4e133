"""Read an ordinary DeepSpeed JSON, fill in its "auto" values and refuse what contradicts the run.

The engine layer accumulates micro-batches in Megatron's schedule, reduces once a step, clips over
both engines and brings its own AdamW. A file that asks DeepSpeed for any of that differently would
train something else than the YAML says, so it is refused and never silently overruled. DeepSpeed
itself is not imported here.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ghostvis_mega.config import deepspeed_keys as keys
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.utils.errors import ConfigError

Engine = Literal["llm", "vision"]
Settings = dict[str, Any]

NEVER = 10**9
"""For `steps_per_print`: the loop prints its own line."""


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """What `deepspeed.initialize(config=...)` gets."""

    stage: int
    config: Settings


def resolve_deepspeed(
    path: str | Path, *, run: RunConfig, engine: Engine, world_size: int
) -> ResolvedDeepSpeed:
    """Resolve one file for one engine.

    Args:
        path: DeepSpeed JSON; relative to the working directory.
        run: The run it belongs to.
        engine: Whose engine it configures.
        world_size: Number of processes.

    Raises:
        ConfigError: With every contradiction, unknown key and unsupported feature.
    """
    resolved, problems = try_resolve(path, run=run, engine=engine, world_size=world_size)
    if problems or resolved is None:
        raise ConfigError(problems)
    return resolved


def engine_files(run: RunConfig) -> dict[Engine, Path]:
    """The file of each engine that the run creates. A frozen part has no engine."""
    files: dict[Engine, Path] = {}
    if "llm" in run.trained_modules:
        files["llm"] = run.deepspeed.llm
    if set(run.trained_modules) - {"llm"}:
        files["vision"] = run.deepspeed.vision or run.deepspeed.llm
    return files


def find_problems(run: RunConfig, *, world_size: int) -> list[str]:
    """Problems of both engines' files, one sentence each."""
    found: list[str] = []
    for engine, path in engine_files(run).items():
        found += try_resolve(path, run=run, engine=engine, world_size=world_size)[1]
    if "llm" not in run.trained_modules:
        found += _frozen_llm_problems(run, world_size)
    return list(dict.fromkeys(found))


def _frozen_llm_problems(run: RunConfig, world_size: int) -> list[str]:
    resolved, problems = try_resolve(
        run.deepspeed.llm, run=run, engine="llm", world_size=world_size
    )
    if resolved is not None and resolved.stage == 3:
        return [
            f"{run.deepspeed.llm}: zero_optimization.stage=3 would not shard the LLM: train.freeze "
            "names it, and a frozen LLM has no engine. Use stage 1 or 2, and parallel.tensor to "
            "split its weights."
        ]
    return problems if resolved is None else []


def try_resolve(
    path: str | Path, *, run: RunConfig, engine: Engine, world_size: int
) -> tuple[ResolvedDeepSpeed | None, list[str]]:
    """As `resolve_deepspeed`, but returns the problems; None when the file has no stage."""
    path = Path(path)
    given, problems = _read(path, field=_field(run, engine))
    if problems:
        return None, problems
    check = _Check(path=path, given=given, run=run, engine=engine, world_size=world_size)
    config = check.resolve()
    return ResolvedDeepSpeed(check.stage, config), check.problems


def _field(run: RunConfig, engine: Engine) -> str:
    own_file = engine == "vision" and run.deepspeed.vision is not None
    return "deepspeed.vision" if own_file else "deepspeed.llm"


def _read(path: Path, *, field: str) -> tuple[Settings, list[str]]:
    if not path.is_file():
        near = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(
                path.name, [p.name for p in path.parent.iterdir()], n=1
            )
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        where = f"working directory: {Path.cwd()}"
        return {}, [f"{field}={path} is not a file ({where}).{hint} ds_configs/ holds ready ones."]
    repeated: list[str] = []

    def collect(pairs: Iterable[tuple[str, Any]]) -> Settings:
        mapping: Settings = {}
        for key, value in pairs:
            if key in mapping:
                repeated.append(f"{path}: the key {key} appears twice. Keep one of the two.")
            mapping[key] = value
        return mapping

    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        return {}, [f"{path} is not valid JSON: {where}: {error.msg}. JSON has no comments."]
    except UnicodeDecodeError:
        return {}, [f"{path} is not UTF-8 text. Save it as UTF-8 JSON."]
    if not isinstance(given, dict):
        return {}, [f"{path} holds a {type(given).__name__}. A DeepSpeed file is one JSON object."]
    return given, repeated


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    # 1 is how ZeRO++'s partition size and the parallel sizes say "off".
    return value is None or value is False or value in ("auto", 1) and value is not True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Check:
    """One file against one run; fills `problems` while it resolves."""

    def __init__(
        self, *, path: Path, given: Settings, run: RunConfig, engine: Engine, world_size: int
    ):
        self.path, self.given, self.run, self.engine = path, given, run, engine
        self.world_size = world_size
        self.stage = 0
        self.problems: list[str] = []

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Record that `key` cannot have `value`; `why` holds the rule and the fix."""
        self.problems.append(f"{self.path}: {key}={json.dumps(value)} {why}")

    def resolve(self) -> Settings:
        """The configuration for `deepspeed.initialize`."""
        self._check_keys(self.given, keys.TOP_LEVEL, keys.REFUSED, above="")
        config: Settings = {
            key: self.given[key]
            for key in sorted(keys.PASSED_ON & self.given.keys())
            if self.given[key] != "auto"
        }
        config |= self._batch() | self._optimizer() | self._zero() | self._precision()
        config["steps_per_print"] = NEVER
        return config

    def _check_keys(
        self, given: Settings, known: frozenset[str], refused: dict[str, str], *, above: str
    ) -> None:
        for key, value in given.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {above}{near[0]}?" if near else "Remove it."
                self.problems.append(f"{self.path}: {above}{key} is no DeepSpeed setting. {hint}")
            elif key in refused and not _is_off(value):
                self.refuse(above + key, value, f"is refused: {refused[key]}. Remove it.")

    def _must_equal(self, key: str, expected: Any, why: str, *, above: str = "") -> None:
        """The value, where given and not "auto", has to be what the run says."""
        section = self.given.get(above.rstrip(".")) if above else self.given
        value = section.get(key, "auto") if isinstance(section, dict) else "auto"
        same = value == expected and isinstance(value, bool) == isinstance(expected, bool)
        if value not in ("auto", None) and not same:
            self.refuse(above + key, value, why)

    def _batch(self) -> Settings:
        batch, parallel = self.run.batch, self.run.parallel
        fix = 'Set "auto".'
        self._must_equal(
            "train_batch_size",
            batch.global_size,
            f"contradicts batch.global_size={batch.global_size}. {fix}",
        )
        self._must_equal(
            "train_micro_batch_size_per_gpu",
            batch.micro_size,
            f"contradicts batch.micro_size={batch.micro_size}. {fix}",
        )
        replicas = max(
            1, self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        )
        count = max(1, batch.global_size // (replicas * batch.micro_size))
        self._must_equal(
            "gradient_accumulation_steps",
            1,
            f"would divide the gradients once more: the schedule already accumulates the {count} "
            f'micro-batches of a step. Set 1 or "auto".',
        )
        self._must_equal(
            "managed_gradient_accumulation",
            True,
            "is refused: gradients are reduced once a step, which needs it true. Remove it.",
        )
        self._must_equal(
            "gradient_allreduce_op",
            "mean",
            "would scale gradients by the number of replicas. Remove it.",
        )
        self._must_equal(
            "gradient_predivide_factor", 1.0, "is refused: gradients are scaled once. Remove it."
        )
        return {
            "train_micro_batch_size_per_gpu": batch.micro_size,
            "gradient_accumulation_steps": 1,
        }

    def _optimizer(self) -> Settings:
        optim = self.run.optim
        self._must_equal(
            "gradient_clipping",
            optim.clip_norm,
            f"contradicts optim.clip_norm={optim.clip_norm:g}, the clip over both engines. "
            'Set "auto".',
        )
        block = self.given.get("optimizer")
        if block is not None:
            self._optimizer_block(block if isinstance(block, dict) else {"type": block})
        block = self.given.get("scheduler")
        values = block.get("params") or {} if isinstance(block, dict) else {"params": block}
        if block is not None and any(value != "auto" for value in values.values()):
            self.refuse(
                "scheduler",
                block,
                "is refused: learning rates follow optim.schedule, optim.warmup_steps and "
                "optim.lr. Remove the block.",
            )
        self._must_equal(
            "zero_force_ds_cpu_optimizer", False, "is refused: there is no offload. Remove it."
        )
        # Clipping happens over both engines together; DeepSpeed knows one of them only.
        return {
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _optimizer_block(self, block: Settings) -> None:
        optim, lr = self.run.optim, self.run.optim.lr
        kind = block.get("type", "auto")
        if str(kind).lower() not in ("auto", "adamw", "adam"):
            self.refuse("optimizer.type", kind, "is refused: the optimizer is AdamW. Remove it.")
        own = [n for n in self.run.trained_modules if (n == "llm") == (self.engine == "llm")]
        rates = {getattr(lr, name) for name in own}
        expected: Settings = {
            "lr": rates.pop() if len(rates) == 1 else None,
            "betas": list(optim.betas),
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }
        fields = {"lr": "optim.lr (one rate for each module)"}
        for key, value in (block.get("params") or {}).items():
            if value == "auto" or key in expected and value == expected[key]:
                continue
            if key in ("torch_adam", "adam_w_mode", "fused", "bias_correction") and value is True:
                continue
            field = fields.get(key, f"optim.{key}")
            rule = f"contradicts {field}" if key in expected else "is no setting of this AdamW"
            fix = 'Set "auto"' if key in expected else "Remove it"
            self.refuse(f"optimizer.params.{key}", value, f"{rule}. {fix}.")

    def _zero(self) -> Settings:
        given = self.given.get("zero_optimization", {})
        if not isinstance(given, dict):
            self.refuse("zero_optimization", given, 'is no object. Write {"stage": 1}.')
            return {}
        self._check_keys(given, keys.ZERO, keys.ZERO_REFUSED, above="zero_optimization.")
        stage = given.get("stage", 0)
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            self.refuse("zero_optimization.stage", stage, "is no ZeRO stage. Use 0, 1, 2 or 3.")
            return {}
        self.stage = stage
        self._zero_stage_rules(stage)
        overlap = given.get("overlap_comm", "auto") is True
        if overlap and stage != 1:
            self.refuse(
                "zero_optimization.overlap_comm",
                True,
                f"is proved with stage 1 only, not with stage {stage}. Set false.",
            )
        for key in ("contiguous_gradients", "compute_grad_norm"):
            why = "is refused: the reduction and the joint norm need it. Set true."
            self._must_equal(key, True, why, above="zero_optimization.")
        zero = {key: given[key] for key in sorted(keys.ZERO_PASSED_ON & given.keys())}
        zero = {key: value for key, value in zero.items() if value != "auto"}
        return {
            "zero_optimization": zero
            | {
                "stage": stage,
                # DeepSpeed's default is true for stage 3.
                "overlap_comm": overlap,
                "contiguous_gradients": True,
                "reduce_bucket_size": self._bucket(given.get("reduce_bucket_size", "auto")),
            }
        }

    def _zero_stage_rules(self, stage: int) -> None:
        run = self.run
        name = "zero_optimization.stage"
        if stage == 3 and run.parallel.pipeline > 1:
            self.refuse(
                name,
                3,
                f"hangs with parallel.pipeline={run.parallel.pipeline}: DeepSpeed gathers weights "
                "over all stages while the next stage waits for activations. Use stage 1 or 2, or "
                "parallel.pipeline=1.",
            )
        if stage == 3 and self.engine == "vision":
            self.refuse(
                name,
                3,
                "hangs for the vision engine when a rank has no image: gathering weights needs "
                "every rank. Set deepspeed.vision to a file of stage 1 or 2.",
            )
        if run.train.precision == "bf16" and stage == 0:
            self.refuse(
                name,
                0,
                "with train.precision=bf16 sums gradients in bf16. Use stage 2, or "
                "train.precision=fp32.",
            )
        if run.train.precision == "bf16" and stage == 1:
            self.refuse(
                name,
                1,
                "with train.precision=bf16 and fp32 gradients silently selects DeepSpeed's "
                "BF16_Optimizer, which cannot reduce once a step. Use stage 2.",
            )

    def _bucket(self, value: Any) -> int:
        if value == "auto":
            # About one layer of the LLM: DeepSpeed's 5e8 would hold 2 GB on every rank.
            return min(max(16 * self.run.model.llm.hidden_size**2, 10**6), 10**8)
        if not _is_number(value) or value < 1:
            self.refuse("zero_optimization.reduce_bucket_size", value, 'is no size. Set "auto".')
            return 1
        return int(value)

    def _precision(self) -> Settings:
        precision = self.run.train.precision
        bf16 = precision == "bf16"
        fp16 = self.given.get("fp16")
        if isinstance(fp16, dict) and fp16.get("enabled") is True:
            self.refuse(
                "fp16.enabled", True, f"contradicts train.precision={precision}. Set false."
            )
        name = "bfloat16" if "bfloat16" in self.given else "bf16"
        block = self.given.get(name, {})
        block = block if isinstance(block, dict) else {"enabled": block}
        self._check_keys(block, keys.BF16, keys.BF16_REFUSED, above=f"{name}.")
        enabled = block.get("enabled", "auto")
        if enabled not in ("auto", bf16) or enabled in (0, 1) and not isinstance(enabled, bool):
            why = f'contradicts train.precision={precision}. Set "auto".'
            self.refuse(f"{name}.enabled", enabled, why)
        types = self.given.get("data_types", {})
        types = types if isinstance(types, dict) else {}
        self._check_keys(types, keys.DATA_TYPES, {}, above="data_types.")
        why = 'is refused: gradients are summed in fp32. Set "fp32" or "auto".'
        self._must_equal("grad_accum_dtype", "fp32", why, above="data_types.")
        self._must_equal("communication_data_type", "fp32", why)
        why = f'contradicts train.precision={precision}. Set "auto".'
        self._must_equal("param_dtype", precision, why, above="data_types.")
        if not bf16:
            return {}
        config: Settings = {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
        if isinstance(block.get("check_grad_overflow"), bool):
            config["bf16"]["check_grad_overflow"] = block["check_grad_overflow"]
        for key in ("buffer_dtype", "keep_in_fp32_modules"):
            if types.get(key, "auto") != "auto":
                config["data_types"][key] = types[key]
        return config
