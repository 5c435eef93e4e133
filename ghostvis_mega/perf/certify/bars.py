"""What the figures of a layout may be. Needs no torch."""

GRADIENT_BAR = 1e-5
"""Relative L2 distance of each parameter's first gradient, fp32."""
WEIGHT_BAR = 1e-5
"""The same of each weight after the steps."""
LOSS_BAR = 1e-6
"""Relative, the worst of the steps."""
NORM_BAR = 1e-5
"""Relative, of the joint gradient norm, the worst of the steps."""
UPDATE_BAR = 1e-2
"""Distance of each weight after the steps, relative to what the steps changed of it: 1 where it is
never updated. Rounding is the more of that, the smaller the steps are."""
NOISE_FACTOR = 2.0
"""BF16: a layout's gradient error, joint and of each parameter, over that of one process that
computes in BF16 too."""
STEPS_FACTOR = 3.0
"""BF16: the same of what follows from the gradients, which one process samples only once: the loss,
the norm, the weights, each update."""
NOISE_CAPS = {"joint_error": 5e-2, "gradient_error": 0.5, "loss_error": 1e-2, "norm_error": 5e-2}
"""BF16: the most noise that is granted at all, of the whole gradient, of each parameter's, of loss
and norm. One process computes with the same kernels as the layouts, so what is wrong with them all
would pass for noise; a gradient that is wrong altogether is 1 off."""
NOISE_CAPS_FP8 = {"joint_error": 0.3, "gradient_error": 0.8, "loss_error": 5e-2, "norm_error": 0.3}
"""The same where the linear layers are in FP8, whose gradients have two bits behind the point."""
LOSS_FLOOR = 1e-4
"""BF16: noise of the loss that is always granted; it can cancel in one process by chance."""


def noise_caps(*, fp8: bool) -> dict[str, float]:
    """The most noise that is granted in this precision."""
    return NOISE_CAPS_FP8 if fp8 else NOISE_CAPS


def noise_bars(noise: dict[str, float]) -> dict[str, float]:
    """BF16: what each figure of a layout may be, by what one process in BF16 got.

    A norm is off by no more than the gradient is, so that the joint gradient's noise is granted to
    it as well, also where the process's own norm was right by chance; and likewise a weight.
    """
    joint = noise["joint_error"]
    return {
        "joint_error": NOISE_FACTOR * joint,
        "ratio": NOISE_FACTOR,
        "loss_error": STEPS_FACTOR * max(noise["loss_error"], LOSS_FLOOR),
        "weight_error": STEPS_FACTOR * max(noise["weight_error"], joint),
        "update_ratio": STEPS_FACTOR,
        "norm_error": STEPS_FACTOR * max(noise["norm_error"], joint),
    }
