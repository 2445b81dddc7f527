"""Answers the scripts here about pyproject.toml, constraints.txt, and the Python that runs this.

    python -P scripts/requirements.py COMMAND [MODE]

    requirements  what pip is to install, one a line
    missing       those of them that this Python lacks; in the mode "own" with the reason
    pins          the versions that this Python has, then those of constraints.txt for the rest
    stamp         what the stamp file of a whole environment says, for setup.sh
    builds        the versions of torch, and of what is compiled for it, that this Python has
    installed     the versions of everything that this Python has
    absent        the lines of constraints.txt for packages that this Python does not have

Needs a Python >= 3.12 (the answer may depend on the Python) with packaging, or with pip.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]

_BUILDS = re.compile(
    r"(pytorch-)?(torch|triton)|torch(vision|audio|ao|-tensorrt)|transformer[-_]engine.*|apex"
    r"|flash-attn.*|(nvidia|cuda)-.*|cupy.*"
)
"""Torch, what it is compiled with, and what is compiled for it: only fits together as it is."""


def packaging(module: str) -> Any:
    """Gives a module of packaging, pip's own copy where there is no other."""
    try:
        return import_module(f"packaging.{module}")
    except ImportError:
        return import_module(f"pip._vendor.packaging.{module}")


def requirements() -> list[str]:
    """Lists what the project needs, its development tools included."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    return [*project.get("dependencies", []), *extras.get("dev", [])]


def installed(path: list[str] | None = None) -> dict[str, str]:
    """Gives the version of every installed distribution, by canonical name."""
    found = metadata.distributions() if path is None else metadata.distributions(path=path)
    # The first of a name counts, as for import.
    versions: dict[str, str] = {}
    for each in found:
        if each.metadata["Name"]:
            versions.setdefault(canonical(each.metadata["Name"]), each.version)
    return versions


def canonical(name: str) -> str:
    """Gives the name by which pip compares: PyYAML and py_yaml are pyyaml and py-yaml."""
    return str(packaging("utils").canonicalize_name(name))


def lack(requirement: Any, have: dict[str, str]) -> str | None:
    """Says why a requirement is not satisfied by what is installed; None when it is."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    text = have.get(canonical(requirement.name))
    if text is None:
        return "not installed"
    version = packaging("version").Version(text)
    # A container's own build of torch calls itself an alpha of the release that it holds, such as
    # 2.11.0a0+1a2b3c4, which by the letter is older than 2.11.
    own_build = version.is_prerelease and version.local
    fits = requirement.specifier.contains(version, prereleases=True) or (
        own_build and requirement.specifier.contains(version.base_version)
    )
    return None if fits else f"is {text}"


def is_build(name: str) -> bool:
    """Whether a distribution is torch, or belongs to it: nothing may replace it."""
    return _BUILDS.fullmatch(canonical(name)) is not None


def main(command: str, mode: str = "system") -> None:
    """Answers one question on standard output."""
    constraints = (REPO / "constraints.txt").read_text()
    exact = [
        (canonical(line.split("==")[0]), line)
        for line in constraints.splitlines()
        if line and not line.startswith("#")
    ]
    lines: list[str] = []
    if command == "requirements":
        lines = requirements()
    elif command == "missing":
        have = installed()
        for text in requirements():
            if reason := lack(packaging("requirements").Requirement(text), have):
                lines.append(f"{text} ({reason})" if mode == "own" else text)
    elif command == "stamp":
        digest = hashlib.sha256("\n".join([*requirements(), constraints]).encode()).hexdigest()
        lines = [f"{sys.version_info.major}.{sys.version_info.minor} {mode} {digest}"]
    elif command in ("pins", "absent", "builds", "installed"):
        have = installed()
        pins = [
            f"{name}=={version}"
            for name, version in sorted(have.items())
            if command != "builds" or is_build(name)
        ]
        absent = [line for name, line in exact if name not in have]
        lines = {"pins": pins + absent, "absent": absent}.get(command, pins)
    else:
        sys.exit(f"error: {command}: unknown command")
    for line in lines:
        print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
