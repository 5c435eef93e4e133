"""What a DeepSpeed file may say, checked against one run and one engine while it is resolved."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from ghostvis_mega.config import deepspeed_keys as keys
from ghostvis_mega.config.schema import RunConfig

Engine = Literal["llm", "vision"]
Settings = dict[str, Any]

NEVER = 10**9
"""For `steps_per_print`: the loop prints its own line."""


def _is_off(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    # A group of one process is how sizes say "off".
    one = key.endswith("_size") and value == 1
    return value is None or value is False or value == "auto" or one


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class FileCheck:
    """One file against one run; fills `problems` while it resolves."""

    def __init__(
        self, *, path: Path, given: Settings, run: RunConfig, engine: Engine, world_size: int
    ):
        self.path, self.given, self.run, self.engine = path, given, run, engine
        self.world_size = world_size
        self.stage = 0
        self.offload = False
        self.problems: list[str] = []
        self._not_objects: set[str] = set()

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

    def _section(self, name: str) -> Settings:
        """An inner object; empty when absent or "auto"."""
        value = self.given.get(name)
        if value is None or value == "auto" or isinstance(value, dict):
            return value if isinstance(value, dict) else {}
        why = "is not an object. Write {...} with its settings, or remove it."
        if name not in self._not_objects:
            self.refuse(name, value, why)
        self._not_objects.add(name)
        return {}

    def _check_keys(
        self, given: Settings, known: frozenset[str], refused: dict[str, str], *, above: str
    ) -> None:
        for key, value in given.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {above}{near[0]}?" if near else "Remove it."
                self.problems.append(f"{self.path}: {above}{key} is no DeepSpeed setting. {hint}")
            elif key in refused and not _is_off(key, value):
                self.refuse(above + key, value, f"is refused: {refused[key]}. Remove it.")

    def _must_equal(self, key: str, expected: Any, why: str, *, above: str = "") -> None:
        """The value, where given and not "auto", has to be what the run says."""
        value = (self._section(above.rstrip(".")) if above else self.given).get(key, "auto")
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
        self._optimizer_block(self._section("optimizer"))
        params = self._section("scheduler").get("params") or {}
        rates = params.values() if isinstance(params, dict) else [params]
        if any(value != "auto" for value in rates):
            self.refuse(
                "scheduler.params",
                params,
                "is refused: learning rates follow optim.schedule, optim.warmup_steps and "
                'optim.lr. Set "auto", or remove the block.',
            )
        self._must_equal(
            "zero_force_ds_cpu_optimizer",
            False,
            "is refused: torch's fused AdamW is the optimizer on the host as well. Remove it.",
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
        params = block.get("params") or {}
        if not isinstance(params, dict):
            self.refuse("optimizer.params", params, "is not an object. Remove it.")
            return
        for key, value in params.items():
            if value == "auto" or key in expected and value == expected[key]:
                continue
            if key in ("torch_adam", "adam_w_mode", "fused", "bias_correction") and value is True:
                continue
            field = fields.get(key, f"optim.{key}")
            rule = f"contradicts {field}" if key in expected else "is no setting of this AdamW"
            fix = 'Set "auto"' if key in expected else "Remove it"
            self.refuse(f"optimizer.params.{key}", value, f"{rule}. {fix}.")

    def _zero(self) -> Settings:
        given = self._section("zero_optimization")
        self._check_keys(given, keys.ZERO, keys.ZERO_REFUSED, above="zero_optimization.")
        stage = given.get("stage", 0)
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            self.refuse("zero_optimization.stage", stage, "is no ZeRO stage. Use 0, 1, 2 or 3.")
            return {}
        self.stage = stage = int(stage)
        offloaded = self._offload(given)
        self._zero_stage_rules(stage)
        overlap = given.get("overlap_comm", "auto") is True
        if overlap and (stage not in (1, 2) or self.offload):
            where = "with offload_optimizer" if self.offload else f"with stage {stage}"
            self.refuse(
                "zero_optimization.overlap_comm",
                True,
                f"is proved with stages 1 and 2 without offload only, not {where}. Set false.",
            )
        why = {
            "contiguous_gradients": "is refused: the reduction needs it. Set true.",
            "compute_grad_norm": "is refused: one norm over both engines is taken. Set true.",
        }
        if stage in (1, 2) and not self.offload:
            why["reduce_scatter"] = (
                f"is refused: gradients of stage {stage} are one buffer, and each rank gets its "
                "part of it. Set true."
            )
        for key, reason in why.items():
            self._must_equal(key, True, reason, above="zero_optimization.")
        return {
            "zero_optimization": self._passed_on(given)
            | offloaded
            | {
                "stage": stage,
                # DeepSpeed's default is true for stage 3.
                "overlap_comm": overlap,
                "contiguous_gradients": True,
                "reduce_bucket_size": self._bucket(given.get("reduce_bucket_size", "auto")),
            }
        }

    def _passed_on(self, given: Settings) -> Settings:
        """Values that DeepSpeed itself gets, of the right type."""
        passed: Settings = {}
        for key in sorted((keys.ZERO_SIZES | keys.ZERO_SWITCHES) & given.keys()):
            value = given[key]
            if value == "auto":
                continue
            if key in keys.ZERO_SWITCHES and not isinstance(value, bool):
                self.refuse(f"zero_optimization.{key}", value, "is neither true nor false.")
            elif key in keys.ZERO_SIZES and not (_is_number(value) and value >= 0):
                self.refuse(f"zero_optimization.{key}", value, 'is no size. Set "auto".')
            passed[key] = value
        return passed

    def _offload(self, given: Settings) -> Settings:
        """The optimizer's place: on the host where the file says so."""
        name = "zero_optimization.offload_optimizer"
        block = given.get("offload_optimizer")
        if block is None or block == "auto":
            return {}
        if not isinstance(block, dict):
            self.refuse(name, block, 'is not an object. Write {"device": "cpu"}, or remove it.')
            return {}
        device = block.get("device", "none")
        if device == "none":
            return {}
        self._check_keys(block, keys.OFFLOAD, keys.OFFLOAD_REFUSED, above=f"{name}.")
        if device != "cpu":
            why = "is refused: the optimizer's state is updated and saved from memory. Use cpu."
            self.refuse(f"{name}.device", device, why)
        ratio = block.get("ratio", 1)
        if isinstance(ratio, bool) or ratio != 1:
            why = "is refused: the optimizer's state is on the host or on the device. Remove it."
            self.refuse(f"{name}.ratio", ratio, why)
        pin = block.get("pin_memory", True)
        if not isinstance(pin, bool):
            self.refuse(f"{name}.pin_memory", pin, "is neither true nor false.")
        if self.stage == 0:
            why = "has nothing to offload with stage 0. Use stage 1, 2 or 3."
            self.refuse(f"{name}.device", device, why)
        self.offload = True
        return {"offload_optimizer": {"device": "cpu", "pin_memory": pin}}

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
                "with train.precision=bf16 has no fp32 weights to update. Use stage 1 or 2, or "
                "train.precision=fp32.",
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
        if self._section("fp16").get("enabled", "auto") not in ("auto", False):
            self.refuse(
                "fp16.enabled", True, f"contradicts train.precision={precision}. Set false."
            )
        name = "bfloat16" if "bfloat16" in self.given else "bf16"
        block = self._section(name)
        self._check_keys(block, keys.BF16, keys.BF16_REFUSED, above=f"{name}.")
        enabled = block.get("enabled", "auto")
        if enabled not in ("auto", bf16) or enabled in (0, 1) and not isinstance(enabled, bool):
            why = f'contradicts train.precision={precision}. Set "auto".'
            self.refuse(f"{name}.enabled", enabled, why)
        types = self._section("data_types")
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
        for key in ("buffer_dtype", "keep_in_fp32_modules"):
            if types.get(key, "auto") != "auto":
                config["data_types"][key] = types[key]
        return config
