"""State of the machine that a latency depends on: clocks, power mode, memory, temperature; what is readable."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

from mdp_mmdet3d.device import processor_name, system_name

_FILES = {
    "cpu_governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "cpu_khz": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
    "cpu_max_khz": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
    "jetson_gpu_hz": "/sys/class/devfreq/17000000.gpu/cur_freq",
    "jetson_gpu_max_hz": "/sys/class/devfreq/17000000.gpu/max_freq",
    "jetson_model": "/proc/device-tree/model",
}
_COMMANDS = {
    "nvpmodel": ["nvpmodel", "-q"],
    "nvidia_smi": [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,memory.used",
        "--format=csv,noheader",
    ],
}


def host_device() -> dict[str, Any]:
    """Processor, system and Python; they do not change during a run."""
    return {"processor": processor_name(), "system": system_name(), "python": platform.python_version()}


def host_state() -> dict[str, str]:
    """Clocks and power mode now; what this machine does not tell is left out."""
    state = {}
    for name, path in _FILES.items():
        try:
            state[name] = Path(path).read_text(encoding="utf-8").strip("\0\n ")
        except (OSError, UnicodeDecodeError):
            continue
    for name, command in _COMMANDS.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        state[name] = done.stdout.strip()
    load = os.getloadavg()
    state["load_average_1min"] = f"{load[0]:.2f}"
    return state


def resident_mib() -> float:
    """Memory of this process that is in RAM, in MiB."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
