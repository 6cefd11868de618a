"""Fine-tune Hugging Face causal language models for Block-Attention (Ma, Wang, Lan, ICLR 2025).

The public Python API. Every name is imported when it is first used, so that `import blockft` is fast.

load_recipe   read a recipe and its overrides
prepare       build the examples of a recipe
train         train on the prepared examples
export        write a checkpoint as an ordinary Hugging Face model folder
evaluate      score a model's answers in block and full mode
Engine        answer prompts from cached blocks
CacheOptions  where the engine keeps blocks, and the size of each tier
RagPrompt     the wording and the order of documents in a prompt
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockft.hub_kernels import refuse_hub_kernels
from blockft.version import __version__

# peft imports bitsandbytes, which on some CPUs advises to install a package that nothing here uses
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
refuse_hub_kernels()

if TYPE_CHECKING:
    from blockft.config.recipe import load_recipe
    from blockft.data.rag_prompt import RagPrompt
    from blockft.inference.engine import Engine
    from blockft.inference.runner import CacheOptions
    from blockft.stages.evaluate import evaluate
    from blockft.stages.export import export
    from blockft.stages.prepare import prepare
    from blockft.stages.train import train

__all__ = [
    "CacheOptions",
    "Engine",
    "RagPrompt",
    "__version__",
    "evaluate",
    "export",
    "load_recipe",
    "prepare",
    "train",
]

_MODULES = {
    "CacheOptions": "blockft.inference.runner",
    "Engine": "blockft.inference.engine",
    "RagPrompt": "blockft.data.rag_prompt",
    "evaluate": "blockft.stages.evaluate",
    "export": "blockft.stages.export",
    "load_recipe": "blockft.config.recipe",
    "prepare": "blockft.stages.prepare",
    "train": "blockft.stages.train",
}
"""The module that defines each lazily imported name."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562).

    Raises:
        AttributeError: the package has no such public name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the module, the lazily imported ones included."""
    return sorted({*globals(), *__all__})
