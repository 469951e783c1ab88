"""Switches off the telemetry of our dependencies, before any of them is loaded.

ONNX Runtime's packages (1.29 and later) look up a host of their maker some ten seconds after the
start. They also leave a device's id and a database under the home folder. They read their
environment once, when they are loaded, so we set it as soon as any of our packages is imported.
"""

import os
import sys

_OFF = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def switch_off() -> bool:
    """Set the environment of this process and its children; a value already there is replaced.

    Returns whether this came in time: False if somebody loaded ONNX Runtime without it before.
    """
    asked = "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY") != "1"
    os.environ.update(_OFF)
    return not asked
