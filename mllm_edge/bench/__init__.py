"""Speed and memory: measure bundles, compare measurements, plan for machines that are not at hand."""

from mllm_edge.bench.curve import draw_curve
from mllm_edge.bench.forms import check_form, colored, plan_tables, plotter, ratio_table, render
from mllm_edge.bench.power import sensor
from mllm_edge.bench.ratios import compare, read_results
from mllm_edge.bench.result import Environment, Limits, Result, Spread, document, from_document
from mllm_edge.bench.runs import (
    check_quality,
    load_cold,
    machine_limits,
    measure,
    measure_apart,
    measure_quality,
    uses_gpu,
)

__all__ = [
    "Environment",
    "Limits",
    "Result",
    "Spread",
    "check_form",
    "check_quality",
    "colored",
    "compare",
    "document",
    "draw_curve",
    "from_document",
    "load_cold",
    "machine_limits",
    "measure",
    "measure_apart",
    "measure_quality",
    "plan_tables",
    "plotter",
    "ratio_table",
    "read_results",
    "render",
    "sensor",
    "uses_gpu",
]
