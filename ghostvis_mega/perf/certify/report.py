"""Verdicts on measurements, and the tables they are shown in. Needs no torch."""

GRADIENT_BAR = 1e-5
"""Relative L2 distance of each parameter's first gradient, fp32."""
WEIGHT_BAR = 1e-5
"""The same of each weight after the steps."""
LOSS_BAR = 1e-6
"""Relative, the worst of the steps."""
NORM_BAR = 1e-5
"""Relative, of the joint gradient norm, the worst of the steps."""
