"""Sphinx: Markdown pages, and the API from its docstrings."""

project = "sigma-vae"
copyright = "2026, the sigma-vae authors"
author = "The sigma-vae authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
myst_heading_anchors = 2  # so that pages can link to a heading
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "auto"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
exclude_patterns = ["studies/**"]  # reports of studies are pages of their own
html_theme = "furo"
html_title = "sigma-vae"
napoleon_custom_sections = [("Shapes", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
suppress_warnings = ["myst.header"]
