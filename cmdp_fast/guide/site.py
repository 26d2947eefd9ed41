"""Sphinx over the sources: what a `conf.py` would say, and a build whose warnings are errors."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import cmdp_fast
from cmdp_fast.guide import api, sources

ROOT = Path(cmdp_fast.__file__).parents[1]
CONFIGURATION = {
    "project": "cmdp_fast",
    "version": cmdp_fast.__version__,
    "release": cmdp_fast.__version__,
    "extensions": [
        "myst_parser",
        "sphinx.ext.autodoc",
        "cmdp_fast.guide.mathml",
        "cmdp_fast.guide.docstrings",
    ],
    "html_theme": "furo",
    "html_title": f"cmdp_fast {cmdp_fast.__version__}",
    "html_math_renderer": "mathml",
    "html_static_path": [str(Path(__file__).parent / "static")],
    "html_css_files": ["site.css"],
    "html_use_index": False,
    "html_domain_indices": False,
    "html_copy_source": False,
    "html_show_sphinx": False,
    "html_show_copyright": False,
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 4,
    "default_role": "py:obj",
    "autodoc_default_options": {"members": True, "undoc-members": True, "member-order": "bysource"},
    "autodoc_typehints_format": "short",
    "add_module_names": False,
}


class SiteError(Exception):
    """The site cannot be built; the message says why."""


def build(folder: Path, root: Path | None = None) -> dict[str, str]:
    """Writes the site of a clone into a folder; returns the modules that are left out, and why."""
    from sphinx.application import Sphinx

    root = ROOT if root is None else root

    if not (root / "README.md").exists():
        raise SiteError(f"{root} is no clone of the repository: it has no README.md. The guides are read from a clone.")
    with tempfile.TemporaryDirectory() as temporary:
        source, doctrees = Path(temporary) / "source", Path(temporary) / "doctrees"
        sources.write(root, source)
        left_out = api.write(source / "api")
        warnings = io.StringIO()
        app = Sphinx(
            source,
            None,
            folder,
            doctrees,
            "html",
            confoverrides=CONFIGURATION,
            status=None,
            warning=warnings,
            freshenv=True,
        )
        with api.plain_types():
            app.build()
    if said := warnings.getvalue().strip():
        raise SiteError(said)
    return left_out
