"""Chooses, from folders of wheels, those that this Python needs; for install_wheels.sh.

    python scripts/choose_wheels.py FOLDER...

Prints their paths, one a line, and on standard error what is kept and why. Needed is what this
Python does not have, or has in a version that does not do for pyproject.toml or for another chosen
wheel. Torch and what is built for it stay as they are. Exit code 2 when the folders do not hold
what is needed; nothing is installed then.
"""

from __future__ import annotations

import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn

from requirements import canonical, installed, is_build, lack, packaging, requirements


@dataclass(frozen=True)
class Wheel:
    """A wheel file, as its name describes it."""

    path: Path
    name: str
    version: str
    fits: bool
    """Whether it is for this Python, on this kind of machine."""

    def requirements(self) -> list[Any]:
        """Reads what it needs itself, without extras."""
        with zipfile.ZipFile(self.path) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
            metadata: Message = message_from_bytes(archive.read(name))
        parse = packaging("requirements").Requirement
        found = [parse(text) for text in metadata.get_all("Requires-Dist") or []]
        return [each for each in found if not each.marker or each.marker.evaluate({"extra": ""})]


def refuse(words: str) -> NoReturn:
    """Ends with one line."""
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)


def read_folders(folders: list[Path]) -> dict[str, list[Wheel]]:
    """Lists the wheels of all folders by name, the newest first."""
    here = set(packaging("tags").sys_tags())
    wheels: dict[str, list[Wheel]] = defaultdict(list)
    for path in sorted(path for folder in folders for path in folder.glob("*.whl")):
        try:
            name, version, _, tags = packaging("utils").parse_wheel_filename(path.name)
        except ValueError as error:
            refuse(f"{path}: {error}")
        wheels[name].append(Wheel(path, str(name), str(version), not here.isdisjoint(tags)))
    parse = packaging("version").Version
    for each in wheels.values():
        each.sort(key=lambda wheel: parse(wheel.version), reverse=True)
    return wheels


def choose(wheels: dict[str, list[Wheel]], have: dict[str, str]) -> list[Wheel]:
    """Chooses the wheels to install.

    Args:
        wheels: What the folders hold, by canonical name.
        have: The versions that are installed.
    """
    if "torch" not in have:
        refuse(f"{sys.executable} has no torch, and wheels of one are not taken: install it first")
    needs = [packaging("requirements").Requirement(text) for text in requirements()]
    chosen: dict[str, Wheel] = {}
    queue = [each for each in needs if canonical(each.name) in wheels]
    queue += [packaging("requirements").Requirement(name) for name in wheels]
    problems = []
    while queue:
        requirement = queue.pop(0)
        name = canonical(requirement.name)
        now = {**have, **{each.name: each.version for each in chosen.values()}}
        reason = lack(requirement, now)
        if reason is None:
            continue
        if name in have and is_build(name):
            problems.append(f"{requirement} is needed, {have[name]} is here and stays")
            continue
        candidates = [
            wheel
            for wheel in wheels.get(name, [])
            if lack(requirement, {name: wheel.version}) is None
        ]
        fitting = [wheel for wheel in candidates if wheel.fits]
        if fitting:
            chosen[name] = fitting[0]
            queue += fitting[0].requirements()
        elif candidates:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            problems.append(
                f"{candidates[0].path.name} is not for Python {version} on this machine"
            )
        else:
            problems.append(f"{requirement} is needed ({reason}), and the folder has no such wheel")
    if problems:
        refuse("; ".join(dict.fromkeys(problems)))
    kept = [name for name in sorted(have) if name in wheels and name not in chosen]
    if kept:
        versions = " ".join(f"{name}=={have[name]}" for name in kept)
        print(f"[wheels] here already, and kept: {versions}", file=sys.stderr)
    return list(chosen.values())


def main(folders: list[str]) -> None:
    """Prints the paths of the chosen wheels."""
    wheels = read_folders([Path(each) for each in folders])
    if not wheels:
        refuse(f"{' '.join(folders)}: no wheel in it")
    for wheel in choose(wheels, installed()):
        print(wheel.path)


if __name__ == "__main__":
    main(sys.argv[1:])
