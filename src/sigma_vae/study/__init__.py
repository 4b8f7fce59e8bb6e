"""Comparisons as data: a grid of runs, made by one command, that says what it found."""

from sigma_vae.study.grid import Cell, StudySpec, cells, read_spec
from sigma_vae.study.report import keep, report, verdicts
from sigma_vae.study.results import collect
from sigma_vae.study.runner import run, spec_of

__all__ = ["Cell", "StudySpec", "cells", "collect", "keep", "read_spec", "report", "run", "spec_of", "verdicts"]
