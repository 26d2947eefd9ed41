"""A Sphinx extension: formulas as MathML, which browsers set by themselves, with no script and no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

_FUNCTION = re.compile(r"<mi>(?:log|exp)</mi>(?!<mo)")  # LaTeX puts a thin space between it and its argument


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX as MathML; ``display`` is ``inline`` or ``block``."""
    from latex2mathml.converter import convert

    return _FUNCTION.sub(r"\g<0><mspace width='0.17em'/>", convert(formula, display=display))


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Registers the renderer `mathml`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
