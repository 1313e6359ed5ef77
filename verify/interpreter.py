"""Triton's interpreter, nearly three times as fast, and with any NumPy.

It patches the language anew at every device function, where once a launch is enough, and computes overflow checks of
integer arithmetic whose result it looks at only in debug mode (which the shadow checker turns on).
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_language_patched: set[frozenset[int]] | None = None
"""The sets of language modules patched by the launch that is running; None outside of a launch."""


def patch_language_once_per_launch() -> None:
    """Speed up every later interpreted launch of this process; changes no result. A second call does nothing."""
    if getattr(interpreter._patch_lang, "once_per_launch", False):
        return
    patch_always, launch_always = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch(function: FunctionType) -> Any:
        modules = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if _language_patched is not None:
            if modules in _language_patched:
                return interpreter._LangPatchScope()
            _language_patched.add(modules)
        scope = patch_always(function)
        # Triton 3.6 makes a number of an array of one dimension, which NumPy 2.5 refuses
        tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return scope

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _language_patched
        outer, _language_patched = _language_patched, set()
        try:
            return launch_always(self, *args, **kwargs)
        finally:
            _language_patched = outer

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    patch.once_per_launch = True  # type: ignore[attr-defined]
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
