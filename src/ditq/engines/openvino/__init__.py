"""Whole transformers on a CPU, compiled by OpenVINO, with ditq's own integers."""

from ditq.engines.openvino.engine import OpenVINOEngine

ENGINE = OpenVINOEngine()

__all__ = ["ENGINE", "OpenVINOEngine"]
