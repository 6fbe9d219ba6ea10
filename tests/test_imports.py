"""The house: imports point down, on one floor only where the design allows it, and nothing needs TensorFlow or configs/."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "robust_vit"
FLOORS = {
    1: "classifier losses loops plots mesh collectives processes checkpoints trees errors files identities registry tables "
    "progress command_line programs allocation",
    2: "attacks corruptions curvature metrics models data",
    3: "training",
    4: "studies objectives",
    5: "train evaluate report runs settings presets planning topology profile",
    6: "main",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
SAME_FLOOR = {
    ("attacks", "corruptions"),
    ("studies", "objectives"),
    ("attacks", "metrics"),
    ("corruptions", "metrics"),
    ("curvature", "metrics"),
    ("evaluate", "report"),
    ("train", "runs"),
    ("train", "settings"),
    ("runs", "settings"),
    ("presets", "settings"),
    ("planning", "report"),
    ("planning", "runs"),
    ("planning", "train"),
    ("topology", "runs"),
    ("topology", "train"),
}


def _room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: pathlib.Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "robust_vit":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robust_vit."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("robust_vit.")}
    return rooms - {"__version__"}


def _files() -> list[pathlib.Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def violations(room: str, imported: set[str]) -> list[str]:
    """The imports of `room` that the house does not allow."""
    wrong = []
    for other in imported - {room}:
        below = FLOOR[other] < FLOOR[room] or FLOOR[other] == FLOOR[room] == 1
        if not below and (room, other) not in SAME_FLOOR:
            wrong.append(f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})")
    return wrong


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert _room(path) in FLOOR, "a new room: give it a floor here and in the design"
    assert violations(_room(path), _imported_rooms(path)) == []


def test_an_import_that_points_up_is_found():
    assert violations("attacks", {"studies"})
    assert violations("attacks", {"models"})
    assert violations("models", {"data"})
    assert not violations("studies", {"attacks", "objectives"})


@pytest.mark.parametrize("name", [path.stem for path in sorted((PACKAGE.parent / "configs").glob("*.py"))])
def test_every_configuration_opens_with_what_it_costs(name):
    head = ast.get_docstring(ast.parse((PACKAGE.parent / "configs" / f"{name}.py").read_text(encoding="utf-8")))
    for word in ("Paper:", "Expected:", "Hardware:", "Command:", f"configs/{name}.py"):
        assert word in head


def test_the_package_imports_without_tensorflow_and_without_configs(tmp_path):
    code = (
        "import sys, pkgutil, importlib, importlib.abc\n"
        # TFDS takes a None in sys.modules for a TensorFlow that is loaded; so it is refused where it would be found.
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'tensorflow':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import robust_vit\n"
        "for module in pkgutil.walk_packages(robust_vit.__path__, 'robust_vit.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "assert not any(name == 'configs' or name.startswith('configs.') for name in sys.modules)\n"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
