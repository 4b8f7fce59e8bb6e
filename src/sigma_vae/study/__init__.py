"""Studies: grids of runs as data, trained by one command, with a report of what they show."""

from sigma_vae.registry import needed_by

with needed_by("sigma_vae.study"):
    from sigma_vae.study.grid import Cell, StudySpec, cells, read_spec
    from sigma_vae.study.report import keep, report, verdicts
    from sigma_vae.study.runner import collect, run, spec_of

__all__ = ["Cell", "StudySpec", "cells", "collect", "keep", "read_spec", "report", "run", "spec_of", "verdicts"]
