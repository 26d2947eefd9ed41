"""A teacher on disk: completions that do not change, and what it said of their tokens.

    cmdp-fast cache-teacher --teacher Qwen/Qwen2.5-7B-Instruct --method kd --output teacher-cache
    cmdp-fast train --teacher cached:teacher-cache --method kd …

`format.py` is what a folder holds and how it is checked, `writer.py` fills one, `reader.py` answers from it.
"""

from .reader import CachedTeacher

__all__ = ["CachedTeacher"]
