"""Small wheels of packages that are made up, so that real pip installs real files in seconds."""

from __future__ import annotations

import base64
import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = f"cp{sys.version_info.major}{sys.version_info.minor}"


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *requires: str,
    tag: str = "py3-none-any",
    files: dict[str, str] | None = None,
    padding: int = 0,
) -> Path:
    """Writes a wheel with one module, or with the files given, and ``padding`` bytes of ballast."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    content = dict(files) if files is not None else {f"{module}.py": ""}
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    extras = {extra for each in requires for extra in re.findall(r"extra == '(.*?)'", each)}
    metadata += "".join(f"Provides-Extra: {extra}\n" for extra in sorted(extras))
    content[f"{info}/METADATA"] = metadata + "".join(f"Requires-Dist: {r}\n" for r in requires)
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    data = {path: text.encode() for path, text in content.items()}
    if padding:
        data[f"{module}.bin"] = os.urandom(padding)
    records = [f"{path},sha256={_digest(blob)},{len(blob)}" for path, blob in data.items()]
    data[f"{info}/RECORD"] = ("\n".join([*records, f"{info}/RECORD,,"]) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for path, blob in data.items():
            archive.writestr(path, blob)
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def make_venv(place: Path, *wheels: Path) -> Path:
    """Makes a virtual environment that holds the wheels; gives its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    borrow(place, "pip")
    if wheels:
        command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels]
        subprocess.run(command, check=True, env=environment())
    return python


def borrow(place: Path, *names: str) -> None:
    """Links packages of the Python that runs the tests; pip takes seconds to install."""
    (site,) = (place / "lib").glob("python*/site-packages")
    for name in names:
        distribution = importlib.metadata.distribution(name)
        paths = {str(path).split("/")[0] for path in distribution.files or ()}
        for top in paths - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))


def environment(**settings: str) -> dict[str, str]:
    """The environment of a user whose pip reaches no network and no folder of wheels."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PRORES_")) and name not in ("PYTHONPATH", "PYTHON")
    }
    return {**kept, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **settings}


def versions(python: Path) -> dict[str, str]:
    """What is installed beside a Python."""
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'], d.version)"
    )
    output = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in output.splitlines())


TORCH = """
__version__ = "{version}"
class version:
    cuda = "{cuda}"
class cuda:
    is_available = staticmethod(lambda: False)
class distributed:
    is_nccl_available = staticmethod(lambda: False)
class backends:
    class cudnn:
        version = staticmethod(lambda: None)
"""


def make_torch(folder: Path, version: str, cuda: str = "13.0") -> Path:
    """A torch that can be imported, and has what the doctor looks at."""
    text = TORCH.format(version=version, cuda=cuda)
    return make_wheel(folder, "torch", version, files={"torch/__init__.py": text})


def make_megatron(folder: Path) -> Path:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    files = {"megatron/core/__init__.py": "", f"megatron/core/datasets/helpers_cpp{suffix}": ""}
    return make_wheel(folder, "megatron-core", "0.19.2", "torch>=2.6", "packaging", files=files)


def make_transformer_engine(folder: Path, version: str, tag: str = "py3-none-any") -> list[Path]:
    files = {
        "transformer_engine/__init__.py": f"__version__ = '{version}'",
        "transformer_engine/pytorch/__init__.py": "Linear = None",
    }
    return [
        make_wheel(folder, "transformer_engine", version, files=files),
        make_wheel(folder, "transformer_engine_torch", version, "torch>=2.1", "einops", tag=tag),
    ]


def make_requirements(folder: Path, **other_versions: str) -> None:
    """A wheel of everything that pyproject.toml asks for but torch, and of packaging."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in constraints if "==" in line)
    pinned = {name.lower(): version for name, version in pinned.items()} | other_versions
    make_megatron(folder)
    make_wheel(folder, "packaging", pinned["packaging"])
    for each in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[^\w-]", each)[0]
        if name not in ("torch", "megatron-core"):
            make_wheel(folder, name, pinned[name.lower()])
