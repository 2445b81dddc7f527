"""Say what the project needs, and install what a Python lacks of it; for the scripts beside this.

    python -P scripts/requirements.py COMMAND

    requirements   prints what pyproject.toml asks for, its "dev" extra included, one a line
    missing        prints those of them that this Python lacks, and why
    stamp MODE     prints what setup.sh writes into an environment that is whole
    install        installs what this Python lacks, by pip, and keeps its torch
        --wheels FOLDER   without a network: from this folder, and all packages that are in it
        --target FOLDER   into a folder beside this Python
    collect FOLDER REQUIREMENT...   prints what collect_wheels.sh is to download into a folder

Torch and what was compiled for it keep their versions, or nothing is installed. Another package is
only replaced where its version does not do. New ones come in the versions of constraints.txt, where
these get along with what is there.

Needs a Python >= 3.12 with pip. Exit codes: 0 done; 2 the Python or the folder cannot be used; 1
anything else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPO / "constraints.txt"

_BUILDS = re.compile(
    r"(pytorch-)?(torch|triton)|torch(vision|audio|ao|-tensorrt)|transformer-engine.*|apex"
    r"|flash-attn.*|(nvidia|cuda)-.*|cupy.*"
)
"""Torch, what it is compiled with, and what is compiled for it: only fits together as it is."""


def fail(code: int, message: str) -> NoReturn:
    """Print one line and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def say(message: str) -> None:
    """Print a line on standard error."""
    print(f"[install] {message}", file=sys.stderr, flush=True)


def packaging(module: str) -> Any:
    """Return a module of packaging, pip's own copy where there is no other."""
    try:
        return import_module(f"packaging.{module}")
    except ImportError:
        return import_module(f"pip._vendor.packaging.{module}")


def canonical(name: str) -> str:
    """Return the name by which pip compares: PyYAML and py_yaml are pyyaml and py-yaml."""
    return str(packaging("utils").canonicalize_name(name))


def requirements() -> list[str]:
    """Return what the project needs, its development tools included."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return [
        *project.get("dependencies", []),
        *project.get("optional-dependencies", {}).get("dev", []),
    ]


def installed() -> dict[str, str]:
    """Return the version of every installed distribution, by canonical name."""
    versions: dict[str, str] = {}
    for each in metadata.distributions():
        if each.metadata["Name"]:  # the first of a name counts, as for import
            versions.setdefault(canonical(each.metadata["Name"]), each.version)
    return versions


def missing(have: dict[str, str]) -> dict[str, str]:
    """Return the requirements that ``have`` does not satisfy, each with the reason."""
    reasons = {}
    for text in requirements():
        requirement = packaging("requirements").Requirement(text)
        here = have.get(canonical(requirement.name))
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if here is None:
            reasons[text] = "not installed"
        elif not _satisfies(requirement.specifier, packaging("version").Version(here)):
            reasons[text] = f"is {here}"
    return reasons


def _satisfies(specifier: Any, version: Any) -> bool:
    # A container's own build of torch calls itself an alpha of the release that it holds, such as
    # 2.11.0a0+1a2b3c4, which by the letter is older than 2.11.
    own_build = version.is_prerelease and version.local
    return specifier.contains(version, prereleases=True) or (
        own_build and specifier.contains(version.base_version)
    )


def stamp(mode: str) -> str:
    """Return what an environment is known by: its Python, how it was made, and what is in it."""
    digest = hashlib.sha256("\n".join([*requirements(), CONSTRAINTS.read_text()]).encode())
    return f"{sys.version_info.major}.{sys.version_info.minor} {mode} {digest.hexdigest()}"


def names_of_wheels(folder: Path) -> list[str]:
    """Return the names of the packages in a folder; each must have a wheel for this Python."""
    here = set(packaging("tags").sys_tags())
    fitting: dict[str, bool] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, _, _, tags = packaging("utils").parse_wheel_filename(path.name)
        except ValueError as error:
            fail(2, f"{path.name}: {error}")
        fitting[name] = fitting.get(name, False) or not here.isdisjoint(tags)
    for name, fits in fitting.items():
        if not fits:
            fail(2, f"{name}: no wheel of it is for {sys.executable} ({sys.version.split()[0]})")
    return list(fitting)


def install(wheels: Path | None, target: Path | None) -> None:
    """Install what is missing; see the top of this file."""
    have = installed()
    lacking = missing(have)
    if "torch" not in have:
        fail(2, f"{sys.executable} has no torch: install it first")
    for text in lacking:
        if _name(text) == "torch":
            fail(2, f"{sys.executable} has torch {have['torch']}, and {text} is needed: choose a"
                    " newer one (of a container: a newer image)")  # fmt: skip
    wanted, source = list(lacking), ["--no-cache-dir"]
    if wheels:
        names = names_of_wheels(wheels)
        source = ["--no-index", "--find-links", str(wheels)]
        # What neither this Python nor the folder has is for the doctor to tell.
        wanted = [text for text in lacking if _name(text) in names]
        wanted += [name for name in names if not (_BUILDS.fullmatch(name) and name in have)]
    chosen = _resolve(wanted, source, have, pinned=not wheels) if wanted else {}
    if not chosen:
        return say(f"nothing to install: {sys.executable} has everything")
    exact = [f"{name}=={version}" for name, version in sorted(chosen.items())]
    say(f"installing{f' into {target}' if target else ''}: {' '.join(exact)}")
    place = ["--target", str(target), "--upgrade"] if target else []
    if words := _pip(*source, *place, "--no-deps", *exact):
        fail(1, f"pip failed\n{words}")
    for name in sorted(chosen.keys() & have.keys()):
        say(f"replaced: {name}=={have[name]} by {name}=={chosen[name]}")


def collect(folder: str, also: list[str]) -> list[str]:
    """Return what a machine needs that has this Python's torch, and nothing else for certain."""
    have = installed()
    source = ["--only-binary", ":all:", "--find-links", folder]
    chosen = _resolve([*missing(have), *also], source, have)
    # What this Python has for building only, that machine may lack.
    chosen = {name: have[name] for name in ("numpy", "packaging", "setuptools")} | chosen
    chosen.pop("transformer-engine-torch", None)  # in the folder already
    return [f"{name}=={version}" for name, version in sorted(chosen.items())]


def _name(requirement: str) -> str:
    return canonical(re.split(r"[^\w.-]", requirement)[0])


def _resolve(
    wanted: list[str], source: list[str], have: dict[str, str], pinned: bool = True
) -> dict[str, str]:
    """Return the versions that pip would install, those of constraints.txt first if ``pinned``."""
    builds = [f"{name}=={have[name]}" for name in sorted(have) if _BUILDS.fullmatch(name)]
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    absent = [line for line in lines if _name(line) not in have]
    say(f"keeping: {' '.join(builds)}")
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch, "constraints.txt"), Path(scratch, "report.json")
        options = [*source, "--dry-run", "--report", str(report), "-c", str(constraints), *wanted]
        constraints.write_text("\n".join([*builds, *absent]))
        if not pinned or _pip(*options):
            if pinned:
                say("the versions of constraints.txt do not get along with these: taking others")
            constraints.write_text("\n".join(builds))
            if words := _pip(*options):
                fail(1, f"pip failed, and nothing was installed\n{words}")
        chosen = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return {canonical(each["name"]): each["version"] for each in chosen}


def _pip(*words: str) -> str:
    """Run pip install, and return what it has said when it fails, nothing when it succeeds."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", *words]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    words = result.stdout + result.stderr
    return (words or f"exit code {result.returncode}") if result.returncode else ""


def main() -> None:
    """Answer one question on standard output, or install."""
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument(
        "command", choices=["requirements", "missing", "stamp", "install", "collect"]
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--target", type=Path)
    args = parser.parse_args()
    lines: list[str] = []
    match args.command:
        case "requirements":
            lines = requirements()
        case "missing":
            lines = [f"{text} ({reason})" for text, reason in missing(installed()).items()]
        case "stamp":
            lines = [stamp(args.words[0])]
        case "collect":
            lines = collect(args.words[0], args.words[1:])
        case "install":
            install(args.wheels, args.target)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
