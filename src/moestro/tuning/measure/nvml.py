"""A GPU's clock and why it is held back, from NVML by ctypes: microseconds a reading, where nvidia-smi takes 50 ms.

Names and numbers are those of nvml.h (NVML API reference: nvmlDeviceGetClockInfo, NVML_CLOCK_SM = 1;
nvmlDeviceGetCurrentClocksThrottleReasons).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = ["reading"]

SM = 1
REASONS = {
    0x2: "clocks set by applications",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


@functools.cache
def library() -> Any:
    """NVML, initialised; None where it is absent."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        return nvml if nvml.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def reading(uuid: str) -> dict[str, Any] | None:
    """{"sm_mhz": ..., "throttle": [...]} of the GPU with this UUID, now; None where nobody can tell."""
    nvml = library()
    if nvml is None:
        return None
    handle, clock, reasons = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_ulonglong()
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    try:
        failed = (
            nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
            or nvml.nvmlDeviceGetClockInfo(handle, SM, ctypes.byref(clock))
            or nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons))
        )
    except AttributeError:  # a driver without one of these
        return None
    if failed:
        return None
    return {
        "sm_mhz": int(clock.value),
        "throttle": [text for bit, text in REASONS.items() if reasons.value & bit],
    }
