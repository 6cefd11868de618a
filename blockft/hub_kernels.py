"""Keep bitsandbytes, which peft imports, from loading compiled code of the Hub.

On a CPU with AVX512-BF16 the import of bitsandbytes 0.50 downloads a kernel of the Hub and loads it, if the
package `kernels` is installed. Code of others never runs in blockft, which does not need this kernel.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LOADING_MODULE = "bitsandbytes.backends.cpu.ops"
"""The module that loads the kernel when it is imported."""


def refuse_hub_kernels() -> None:
    """Make the package `kernels` missing for the module that would load one; call it before its import.

    bitsandbytes then computes without the kernel, as it does where `kernels` is not installed. Calls can be
    repeated.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the one module, and gives it a loader that hides `kernels`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LOADING_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _LoaderWithoutKernels(spec.loader)
        return spec


class _LoaderWithoutKernels(Loader):
    """Executes a module while an import of `kernels` fails."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        hidden = {name: sys.modules[name] for name in ("kernels",) if name in sys.modules}
        sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's mark of a missing module
        try:
            self._inner.exec_module(module)
        finally:
            del sys.modules["kernels"]
            sys.modules.update(hidden)
