"""What Megatron imports and reads at every start, kept to what the run uses.

Of a start on the CPU device the imports take most: see docs/benchmarks/start-up.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from megatron_prores.upstream.registry import wrap


def import_on_demand(package: str) -> None:
    """Let ``import package`` import nothing until something of the package is asked for.

    The module has its file before. With importlib's LazyLoader, which asks for that as well,
    ``inspect.getsource`` of anything would import it: it goes through all modules.

    Args:
        package: A top-level one that nothing has imported yet; else, and where it is not
            installed, nothing changes.
    """
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        return
    module: Any = ModuleType(package)
    module.__spec__, module.__file__ = spec, spec.origin

    def load(name: str) -> Any:
        # The module's own __getattr__: asked for what the module does not have.
        del module.__getattr__
        module.__path__ = spec.submodule_search_locations
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return getattr(module, name)

    module.__getattr__ = load
    sys.modules[package] = module


@contextlib.contextmanager
def hidden(package: str) -> Iterator[None]:
    """Let modules that are imported in the block not find a package, as if it were not installed.

    Args:
        package: A top-level one; it can be imported afterwards.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # makes an import raise ImportError
    try:
        yield
    finally:
        del sys.modules[package]


_flag_help: dict[type, dict[str, str]] = {}
"""Class of Megatron's configuration -> the help of its flags, once it was read."""


_BARE = re.compile(r"(?<!%)%(?![%(])")


def read_flag_help_once() -> None:
    """Read the help of Megatron's flags from its sources once, not for each of a run's parsers.

    There are four of these: the checkpoint's flags, and ours, are read beside those of the run.
    A bare percent sign in one, which argparse takes for the start of a format, would end ``--help``
    with a traceback: it is doubled.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    def field_docstrings(stock: Callable[[], dict[str, str]], named: dict[str, Any]) -> Any:
        config_class = named["src_cfg_class"]
        if config_class not in _flag_help:
            helps = stock().items()
            _flag_help[config_class] = {name: _BARE.sub("%%", text) for name, text in helps}
        return dict(_flag_help[config_class])

    name = "_get_field_docstrings"
    purpose = read_flag_help_once
    wrap(ArgumentGroupFactory, name, ("src_cfg_class",), field_docstrings, purpose)
