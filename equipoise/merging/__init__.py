"""Merging: several models fine-tuned from one base become one, without training."""

from equipoise.merging.baselines import (
    DARE,
    TIES,
    GreedySoup,
    TaskArithmetic,
    WeightAveraging,
    dare_merge,
    greedy_soup,
    task_arithmetic,
    ties_merge,
    weight_averaging,
)
from equipoise.merging.files import merge_files
from equipoise.merging.method import MergingMethod
from equipoise.merging.pcb_merging import (
    PCBMerging,
    PCBResult,
    pcb_merge,
    pcb_merge_state_dicts,
    search_coefficients,
)
from equipoise.merging.vectors import merge_state_dicts, task_vector

__all__ = [
    "DARE",
    "TIES",
    "GreedySoup",
    "MergingMethod",
    "PCBMerging",
    "PCBResult",
    "TaskArithmetic",
    "WeightAveraging",
    "dare_merge",
    "greedy_soup",
    "merge_files",
    "merge_state_dicts",
    "pcb_merge",
    "pcb_merge_state_dicts",
    "search_coefficients",
    "task_arithmetic",
    "task_vector",
    "ties_merge",
    "weight_averaging",
]
