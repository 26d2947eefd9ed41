"""What a setting is called in tables and plots."""

from __future__ import annotations

from .plan import Study
from .statistics import Setting


def short(setting: Setting) -> str:
    """What a candidate changes: the value alone, where that is one setting."""
    changes = setting.candidate.partition(":")[2]
    value = changes.partition("=")[2]
    return value if value and "=" not in value else changes or "default"


def label(study: Study, setting: Setting) -> str:
    """The method, and which of its candidates where it has several."""
    candidates = next(method.candidates for method in study.methods if method.name == setting.method)
    return f"{setting.method} {short(setting)}" if len(candidates) > 1 else setting.method
