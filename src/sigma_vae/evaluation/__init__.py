"""Evaluation of trained models: metrics in numbers, and pictures."""

from sigma_vae.evaluation.base import Column, Estimate, EvaluationData, Metric, Record, Row
from sigma_vae.evaluation.suite import Evaluation, calibrate, evaluate, score

__all__ = [
    "Column",
    "Estimate",
    "Evaluation",
    "EvaluationData",
    "Metric",
    "Record",
    "Row",
    "calibrate",
    "evaluate",
    "score",
]
