"""The site of the documentation: `make docs` builds it, without a network.

Its root is the repository's, so that a link between two Markdown files leads to the same place on
the site as among the sources. It holds `docs/` and the few pages that these link to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmloss_ext.integrations import versions
from llmloss_ext.version import __version__

# Two integrations inherit from what these packages have; the build has neither.
autodoc_mock_imports = ["axolotl", "torchtitan"]
versions.check_version = lambda *_: None  # type: ignore[assignment]

project = "llmloss_ext"
release = version = __version__
html_title = f"llmloss_ext {__version__}"

root_doc = "docs/index"
include_patterns = ["docs/**.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/results/*/report.md"]
exclude_patterns = [".*", "build", "dist", "runs", "docs/_*", "**/__pycache__"]

highlight_language = "none"  # of blocks that name none
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4

# Sphinx imports what it documents, so signatures and options stand here as `help()` shows them.
autodoc_member_order = "bysource"
default_role = "py:obj"  # what stands in single backticks in docstrings
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "to_start.html"}  # the root of the site leads to docs/index.html
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def escape(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Keeps |x| a magnitude: docstrings are plain text, and reStructuredText would substitute x.

    And a colon in a sentence on an attribute, before which napoleon would see a type.
    """
    if what in ("attribute", "data", "property"):
        lines.insert(0, r"\ ")  # which shows nothing
    for at, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[at] = "".join(parts)


def without_overloads(analyzer: ModuleAnalyzer) -> None:
    """Overloads are for type checkers; readers want the one signature with every option."""
    _analyze(analyzer)
    analyzer.overloads = {}


_analyze = ModuleAnalyzer.analyze


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    ModuleAnalyzer.analyze = without_overloads
    app.connect("autodoc-process-docstring", escape, priority=1)  # before napoleon
