"""Names of the machine that measures."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Model name of the CPU as the operating system states it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        model = names.get("model name") or names.get("Model") or names.get("CPU part")
        if model:
            # Virtual machines report a generic name: family and model tell the generations apart.
            detail = f" family {names['cpu family']} model {names['model']}" if "model" in names else ""
            return model + detail
    return platform.processor() or platform.machine()


def system_name() -> str:
    """Operating system, number of cores and, where they can be read, clocks and power mode."""
    parts = [f"{platform.system()} {platform.release()}", f"{os.cpu_count()} cores"]
    frequency = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    for title, path in (
        ("governor", frequency / "scaling_governor"),
        ("max kHz", frequency / "scaling_max_freq"),
        ("nvpmodel", Path("/var/lib/nvpmodel/status")),
    ):
        try:
            parts.append(f"{title} {path.read_text(encoding='utf-8').strip()}")
        except OSError:
            continue  # not this kind of machine
    return ", ".join(parts)
