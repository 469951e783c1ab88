"""The only import of ONNX Runtime: all other modules take `ort` from here (a test checks this).

Its packages collect telemetry unless they are told not to before they are loaded. Importing
seechat_lite, which anybody who imports this module has done, told them (see
seechat_weights.telemetry).
"""

import logging

import onnxruntime as ort

from seechat_weights import SILENT

ort.disable_telemetry_events()  # for Windows; elsewhere the only means left if we came too late
if not SILENT:
    logging.getLogger(__name__).warning(
        "ONNX Runtime was loaded before seechat_lite, with its telemetry on: import seechat_lite "
        "first, or set ORT_DISABLE_TELEMETRY=1"
    )

__all__ = ["ort"]
