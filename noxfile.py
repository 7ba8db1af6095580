"""The promised versions, tried out: ``nox`` runs the default test suite on the oldest and on the newest of everything.

``oldest`` takes the oldest Python and holds each dependency at the floor that ``pyproject.toml`` names, ``newest`` the
newest Python and what the index has. ``nox -s newest`` runs every Python but the oldest; what follows ``--`` goes to
pytest. Interpreters must be there; everything else is installed, for PyTorch some gigabytes each time.
"""

from __future__ import annotations

import pathlib

import nox
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PYTHONS = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]

nox.options.sessions = ["oldest", f"newest-{PYTHONS[-1]}"]


def floors() -> list[str]:
    """Each dependency of the package and its tests at the series of its floor: ``torch>=2.8`` is ``torch==2.8.*``."""
    pins = []
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]):
        requirement = Requirement(text)
        (floor,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        # A floor with a patch number (0.0.15) is that release, another one a series (8 is 8.0).
        series = floor.public if floor.micro else f"{floor.major}.{floor.minor}.*"
        requirement.specifier = SpecifierSet(f"=={series}")
        pins.append(str(requirement))
    return pins


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The oldest of everything."""
    constraints = pathlib.Path(session.create_tmp()) / "floors.txt"
    constraints.write_text("\n".join(floors()) + "\n")
    session.install("--constraint", str(constraints), "--editable", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS[1:])
def newest(session: nox.Session) -> None:
    """The newest of everything."""
    session.install("--editable", ".[test]")
    session.run("pytest", *session.posargs)
