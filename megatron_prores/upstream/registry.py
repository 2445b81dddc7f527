"""Run-time replacements of functions: applied once however often asked for, listed, undone.

A replaced function runs the stock one inside of its wrappers. A wrapper is known by its purpose:
where a function was defined. The same one again, with other things to hold on to, takes the place
of the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

WRITTEN_AGAINST = "0.19.2"
"""The version of megatron-core whose functions are wrapped."""

Wrapper = Callable[[Callable[..., Any], dict[str, Any]], Any]
"""(stock call, its arguments by name) -> what the replaced function returns."""

_MARK = "_prores_replacement"


@dataclass
class Replacement:
    """One replaced function, and what runs around it."""

    owner: ModuleType | type
    name: str
    stock: Callable[..., Any]
    descriptor: Any
    """The stock function as its owner holds it: in a class perhaps a static method; None: it is
    inherited."""
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    """Purpose -> the wrapper, innermost first."""

    def install(self) -> None:
        """Put the function that runs the wrappers into the place of the stock one."""
        signature = inspect.signature(self.stock)

        @functools.wraps(self.stock)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            call: Callable[..., Any] = functools.partial(self.stock, *args, **kwargs)
            named = signature.bind(*args, **kwargs).arguments
            for wrapper in self.wrappers.values():
                call = functools.partial(_call_wrapped, wrapper, call, named)
            return call()

        setattr(replaced, _MARK, self)
        setattr(self.owner, self.name, replaced)

    def restore(self) -> None:
        """Put the stock function back, unless somebody else has replaced ours meanwhile."""
        if getattr(getattr(self.owner, self.name, None), _MARK, None) is not self:
            return
        if self.descriptor is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.descriptor)


def _call_wrapped(
    wrapper: Wrapper, call: Callable[..., Any], named: dict[str, Any], **more: Any
) -> Any:
    # ``more`` is what an outer wrapper adds to the stock call.
    return wrapper(functools.partial(call, **more), named)


_replacements: list[Replacement] = []

_values: list[tuple[ModuleType | type, str, Any, str]] = []
"""(owner, name, its stock value, purpose) of what has another value, in the order of replacing."""


def wrap(
    owner: ModuleType | type,
    name: str,
    needs: tuple[str, ...],
    wrapper: Wrapper,
    purpose: Callable[..., Any] | None = None,
) -> None:
    """Replace ``owner.name`` by ``wrapper(stock call, arguments by name)``.

    Args:
        owner: The module or class that callers look the function up in.
        name: Its name there.
        needs: Parameters of the stock function that the wrapper relies on.
        wrapper: Runs around those that are there already; takes the place of an earlier one of the
            same purpose.
        purpose: What the wrapper is known by: where this function is defined, or, without one,
            where the wrapper is.

    Raises:
        RuntimeError: The installed Megatron has no such function, or not with these parameters.
    """
    current = getattr(owner, name, None)
    parameters = inspect.signature(current).parameters if current is not None else {}
    missing = [parameter for parameter in needs if parameter not in parameters]
    if current is None or missing:
        what = f"has no parameter {', '.join(missing)}" if missing else "is gone"
        raise _moved(owner, name, what)
    replacement: Replacement | None = getattr(current, _MARK, None)
    if replacement is None or replacement.owner is not owner:
        replacement = Replacement(owner, name, current, vars(owner).get(name))
        replacement.install()
        _replacements.append(replacement)
    replacement.wrappers[_place(purpose or wrapper)] = wrapper


def replace(owner: ModuleType | type, purpose: Callable[..., Any], /, **values: Any) -> None:
    """Give attributes of a module or class other values, until :func:`undone_afterwards` ends.

    Args:
        owner: The module or class.
        purpose: The function that this belongs to.
        **values: The values, by the attributes' names.

    Raises:
        RuntimeError: The installed Megatron has no such attribute.
    """
    for name, value in values.items():
        if not hasattr(owner, name):
            raise _moved(owner, name, "is gone")
        _values.append((owner, name, getattr(owner, name), _place(purpose)))
        setattr(owner, name, value)


def undo(purpose: Callable[..., Any]) -> None:
    """Take away the wrappers of a purpose, and those that are defined inside of that function."""
    place = _place(purpose)
    for replacement in _replacements:
        for known in [w for w in replacement.wrappers if w == place or w.startswith(f"{place}.")]:
            del replacement.wrappers[known]
    _restore_unwrapped()


@contextmanager
def undone_afterwards() -> Iterator[None]:
    """Take back, at the end of the block, what was wrapped and replaced in it."""
    before = [(replacement, dict(replacement.wrappers)) for replacement in _replacements]
    values = len(_values)
    try:
        yield
    finally:
        while len(_values) > values:
            owner, name, stock, _ = _values.pop()
            setattr(owner, name, stock)
        for replacement in _replacements:
            replacement.wrappers.clear()
        for replacement, wrappers in before:
            replacement.wrappers.update(wrappers)
        _restore_unwrapped()


def listed() -> dict[str, list[str]]:
    """List what is replaced: full name -> the purposes."""
    return {
        f"{replacement.owner.__name__}.{replacement.name}": list(replacement.wrappers)
        for replacement in _replacements
    } | {f"{owner.__name__}.{name}": [purpose] for owner, name, _, purpose in _values}


def _moved(owner: ModuleType | type, name: str, what: str) -> RuntimeError:
    import megatron.core

    return RuntimeError(
        f"megatron-core {megatron.core.__version__} has moved: {owner.__name__}.{name} {what}. "
        f"It was replaced for {WRITTEN_AGAINST}."
    )


def _place(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _restore_unwrapped() -> None:
    for replacement in [each for each in _replacements if not each.wrappers]:
        replacement.restore()
        _replacements.remove(replacement)
