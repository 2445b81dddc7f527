"""Run-time replacements in Megatron and torch: listed, undone, and applied twice without harm.

:func:`wrap` runs a function around the stock one, :func:`replace` puts another object in its place.
Both name their purpose, the function that they belong to: the same purpose again takes the place of
its earlier replacement, and :func:`undo` takes it back. A later purpose runs around an earlier one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

WRITTEN_AGAINST = "0.19.2"
"""The version of megatron-core whose functions are replaced."""

_VERSIONS = {
    "megatron": ("megatron-core", WRITTEN_AGAINST),
    "torch": ("torch", "2.15 and 2.11"),
    "transformer_engine": ("transformer_engine", "2.20"),
}
"""Top-level package -> its distribution, and the version that its replacements are for."""

Wrapper = Callable[[Callable[..., Any], dict[str, Any]], Any]
"""(stock call, its arguments by name) -> what the replaced function returns. What a wrapper gives
to the stock call takes the place of the caller's argument of that name."""

Owner = ModuleType | type

_INHERITED = object()
"""What a class holds itself that has a function from its base class."""


@dataclass(frozen=True)
class Entry:
    """Why something is replaced, and what that relies on."""

    purpose: str
    """The first line of what its function says of itself."""
    function: str
    """The full name of that function."""
    written_against: str
    """The package and the version that it was written against."""
    needs: tuple[str, ...] = ()
    """Parameters of the stock function that it relies on."""


@dataclass(frozen=True)
class _Layer:
    entry: Entry
    wrapper: Wrapper | None = None
    value: Any = None
    """What stands in the place of the stock object where there is no wrapper."""


@dataclass
class _Replacement:
    """One replaced name, with a layer for each purpose."""

    owner: Owner
    name: str
    stock: Any
    held: Any
    """The stock object as its owner holds it: in a class perhaps a static method."""
    layers: dict[str, _Layer] = field(default_factory=dict)
    """Purpose -> its layer, innermost first."""
    installed: Any = None

    @property
    def full_name(self) -> str:
        return f"{_name(self.owner)}.{self.name}"

    @property
    def is_in_place(self) -> bool:
        """Whether nobody else has replaced ours meanwhile."""
        return vars(self.owner).get(self.name) is self.installed

    def install(self) -> None:
        """Put what the layers make of the stock object in its place."""
        outermost = [*self.layers.values()][-1]
        new = self._call_layers() if outermost.wrapper else outermost.value
        if isinstance(self.held, (staticmethod, classmethod)):
            new = staticmethod(new)
        setattr(self.owner, self.name, new)
        self.installed = new

    def restore(self) -> None:
        """Put the stock object back."""
        if self.held is _INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.held)

    def _call_layers(self) -> Callable[..., Any]:
        signature = inspect.signature(self.stock)

        @functools.wraps(self.stock)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            named = signature.bind(*args, **kwargs).arguments
            call: Callable[..., Any] = functools.partial(_call, self.stock, signature, named)
            for layer in self.layers.values():
                if layer.wrapper is None:
                    call = functools.partial(_call, layer.value, signature, named)
                else:
                    call = functools.partial(_call_wrapped, layer.wrapper, call, named)
            return call()

        return replaced


def _call(
    function: Callable[..., Any],
    signature: inspect.Signature,
    named: dict[str, Any],
    /,
    **more: Any,
) -> Any:
    """Call a function as its caller did, with ``more`` in the place of what was given."""
    known = {name: more.pop(name) for name in signature.parameters if name in more}
    given = inspect.BoundArguments(signature, OrderedDict(named | known))
    return function(*given.args, **{**given.kwargs, **more})


def _call_wrapped(
    wrapper: Wrapper, call: Callable[..., Any], named: dict[str, Any], /, **more: Any
) -> Any:
    # ``more`` is what an outer wrapper adds to the stock call.
    return wrapper(functools.partial(call, **more), named)


_replacements: list[_Replacement] = []


def wrap(
    owner: Owner,
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
        wrapper: Runs around those that are there already.
        purpose: The function that this belongs to; without one, the wrapper itself.

    Raises:
        RuntimeError: The installed package has no such function, or not with these parameters.
    """
    parameters = inspect.signature(_existing(owner, name)).parameters
    if missing := [parameter for parameter in needs if parameter not in parameters]:
        raise _moved(owner, name, f"has no parameter {', '.join(missing)}")
    _add(owner, name, _Layer(_entry(owner, purpose or wrapper, needs), wrapper=wrapper))


def replace(owner: Owner, purpose: Callable[..., Any], /, **values: Any) -> None:
    """Put other objects in the place of attributes of a module or class.

    Args:
        owner: The module or class.
        purpose: The function that this belongs to.
        **values: Name -> what takes its place. A function that takes that of another must take
            all of its parameters.

    Raises:
        RuntimeError: The installed package has no such attribute, or a function with more
            parameters.
    """
    for name, value in values.items():
        before = _existing(owner, name)
        if unknown := _parameters_not_taken(before, value):
            raise _moved(owner, name, f"also has the parameter {', '.join(unknown)}")
        _add(owner, name, _Layer(_entry(owner, purpose), value=value))


def stock(owner: Owner, name: str) -> Any:
    """Return what ``owner.name`` is without the replacements."""
    found = [each for each in _replacements if each.owner is owner and each.name == name]
    return found[0].stock if found else getattr(owner, name)


def undo(purpose: Callable[..., Any]) -> None:
    """Take back what was replaced for a purpose, and by functions defined inside of that one."""
    place = _name(purpose)
    for replacement in _replacements:
        for known in [p for p in replacement.layers if p == place or p.startswith(f"{place}.")]:
            del replacement.layers[known]
    _reinstall()


@contextmanager
def undone_afterwards() -> Iterator[None]:
    """Take back, at the end of the block, what was replaced in it."""
    before = [(replacement, dict(replacement.layers)) for replacement in _replacements]
    try:
        yield
    finally:
        for replacement in _replacements:
            replacement.layers.clear()
        for replacement, layers in before:
            replacement.layers.update(layers)
        _reinstall()


def listed() -> dict[str, list[Entry]]:
    """List what is replaced: full name -> why, innermost first."""
    found: dict[str, list[Entry]] = {}
    for replacement in _replacements:
        entries = [layer.entry for layer in replacement.layers.values()]
        found[replacement.full_name] = found.get(replacement.full_name, []) + entries
    return found


def _add(owner: Owner, name: str, layer: _Layer) -> None:
    known = [each for each in _replacements if each.owner is owner and each.name == name]
    replacement = next((each for each in known if each.is_in_place), None)
    if replacement is None:
        held = vars(owner).get(name, _INHERITED)
        replacement = _Replacement(owner, name, getattr(owner, name), held)
        _replacements.append(replacement)
    replacement.layers[layer.entry.function] = layer
    replacement.install()


def _reinstall() -> None:
    for replacement in [*_replacements]:
        if not replacement.layers:
            _replacements.remove(replacement)
        if replacement.is_in_place and replacement.layers:
            replacement.install()
        elif replacement.is_in_place:
            replacement.restore()


def _existing(owner: Owner, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _moved(owner, name, "is gone") from None


def _moved(owner: Owner, name: str, how: str) -> RuntimeError:
    distribution, version = _version(owner)
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    return RuntimeError(
        f"{distribution} {installed} has moved: {_name(owner)}.{name} {how}. "
        f"It was replaced for {version}."
    )


def _parameters_not_taken(before: Any, value: Any) -> list[str]:
    if not (isinstance(before, FunctionType) and isinstance(value, FunctionType)):
        return []
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = inspect.signature(value).parameters
    if any(each.kind in any_number for each in taken.values()):
        return []
    given = inspect.signature(before).parameters
    known = {"self", *taken}  # nobody names self when calling
    return [name for name, each in given.items() if not (name in known or each.kind in any_number)]


def _entry(owner: Owner, purpose: Callable[..., Any], needs: tuple[str, ...] = ()) -> Entry:
    first_line = (inspect.getdoc(purpose) or "").partition("\n")[0]
    return Entry(first_line, _name(purpose), " ".join(_version(owner)), needs)


def _version(owner: Owner) -> tuple[str, str]:
    top = _name(owner).partition(".")[0]
    return _VERSIONS.get(top, (top, ""))


def _name(thing: Any) -> str:
    """Return the full name of a module, class or function."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    return f"{thing.__module__}.{thing.__qualname__}"
