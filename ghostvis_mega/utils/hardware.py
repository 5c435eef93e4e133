"""Peak arithmetic rates of devices by name, and what this machine is called."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DevicePeak:
    """Dense peak FLOP/s of one device (without structured sparsity), from its data sheet."""

    bf16: float
    fp8: float | None = None


_PEAKS: tuple[tuple[str, DevicePeak], ...] = (
    (r"\bGB200\b", DevicePeak(2500e12, 5000e12)),
    (r"\bB200\b", DevicePeak(2250e12, 4500e12)),
    (r"\bGH200\b", DevicePeak(989e12, 1979e12)),
    (r"\bH200 NVL\b", DevicePeak(835e12, 1671e12)),
    (r"\bH200\b", DevicePeak(989e12, 1979e12)),
    (r"\bH[18]00 PCIe\b", DevicePeak(756e12, 1513e12)),
    (r"\bH100 NVL\b", DevicePeak(835e12, 1671e12)),
    (r"\bH[18]00\b", DevicePeak(989e12, 1979e12)),
    (r"\bH20\b", DevicePeak(148e12, 296e12)),
    (r"\bA[18]00\b", DevicePeak(312e12)),
    (r"\bL40S\b", DevicePeak(362e12, 733e12)),
    (r"\bL4\b", DevicePeak(121e12, 242e12)),
    (r"\bRTX 4090\b", DevicePeak(165e12, 330e12)),
)
"""First match wins, so the narrower name stands first."""


def device_peak(name: str) -> DevicePeak | None:
    """Peak of the device that torch calls `name`; None when unknown, so that no MFU is invented.

    A MIG slice carries its device's name but a fraction of its units: unknown as well.
    """
    if re.search(r"\bMIG\b", name):
        return None
    for pattern, peak in _PEAKS:
        if re.search(pattern, name, flags=re.IGNORECASE):
            return peak
    return None


def cpu_name() -> str:
    """Marketing name of the processor, or its architecture where Linux does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.machine()


def has_cuda_device() -> bool:
    """Whether this process may use an NVIDIA GPU, found without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))
