"""The device that a latency belongs to. Standard library only: the probe bundle and the vehicle's runtime carry it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """Where latency was measured; `python` and `system` are for people, the rest must agree to use a latency elsewhere.

    Attributes:
        processor: Model name of the CPU or GPU.
        runtime: What runs the operators, e.g. ``"onnxruntime-cpu"``.
        runtime_version: Its version.
        threads: CPU threads used; 0 where it does not apply.
        precision: ``"float32"``, ``"float16"``, ...
        system: Operating system, cores, driver.
        python: Version of the interpreter that measured.
    """

    processor: str
    runtime: str
    runtime_version: str
    threads: int
    precision: str
    system: str = ""
    python: str = ""

    def differences(self, other: Device) -> list[str]:
        """Fields in which two devices are not interchangeable, as readable text."""
        names = ("processor", "runtime", "runtime_version", "threads", "precision")
        return [
            f"{name}: {getattr(self, name)!r} and {getattr(other, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else ""
        return f"{self.runtime} {self.runtime_version} on {self.processor}{threads}, {self.precision}"


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
