"""Modules that are imported when something of theirs is first used, and not when they are only named.

`import grpc` names asyncio (which brings ssl) and its own asyncio half: a third of a short command's start, for nothing
that a blocking client uses. importlib.util.LazyLoader does not help: a second `import` of the same name looks at
`__spec__`, and that already loads it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class Deferred(ModuleType):
    """Stands for the module of its name until an attribute is asked for; then passes on to the real one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system asks for these, and they are no use of the module
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer(*names: str) -> None:
    """Have the modules of these names stood for, unless they are there already."""
    for name in names:
        sys.modules.setdefault(name, Deferred(name))
