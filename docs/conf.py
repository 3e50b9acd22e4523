"""The documentation: `sphinx-build -W docs docs/_build`."""

import agentsd

project = "AgentSD for diffusers"
author = "the AgentSD for diffusers developers"
copyright = author
version = release = agentsd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]
# pages that point at files of the repository, which are no part of the documentation
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"{project} {version}"
default_role = "code"
