"""What numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any


def describe_machine() -> dict[str, Any]:
    """System, processor, cores and versions, as JSON values."""
    return {
        "system": platform.system(),
        "processor": processor_name(),
        "n_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def count_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on all systems
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name as the system gives it, with its family where the name says little."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            parts = [line.partition(":") for line in stream]
        fields = {key.strip(): value.strip() for key, _, value in parts}
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    return f"{name}, family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
