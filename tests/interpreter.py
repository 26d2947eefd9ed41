"""Triton's interpreter, made quick enough for a test suite.

At every call of a helper from a kernel the interpreter looks through all of `triton.language` for functions to replace,
although the launch has replaced them already; nine tenths of the time go there. Here it looks once a launch.
"""

from typing import Any

from triton.runtime import interpreter


def look_once_a_launch() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    looked: dict[tuple[str, ...], Any] = {}

    def patch_once(function):
        languages = tuple(
            sorted(k for k, v in function.__globals__.items() if v in (interpreter.tl, interpreter.tl.core))
        )
        if languages not in looked:
            looked[languages] = patch(function)
        return looked[languages]

    def launch_afresh(self, *args, **settings):
        looked.clear()
        return launch(self, *args, **settings)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
