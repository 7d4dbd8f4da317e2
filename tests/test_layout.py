"""The folder names neither shadow an installed package nor are shadowed by one, and data folders hold data."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_in(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*.py")]


@pytest.mark.parametrize("name", ["factory", "train", "serve"])
def test_our_packages_are_ours(name):
    assert Path(importlib.util.find_spec(name).origin).parent == ROOT / name


def test_the_library_called_datasets_is_not_our_folder():
    assert ROOT not in Path(importlib.util.find_spec("datasets").origin).parents[:2]


@pytest.mark.parametrize("folder", ["datasets", "experts", "seeds", "templates", "profiles", "models"])
def test_data_folders_hold_no_python(folder):
    assert python_in(ROOT / folder) == []


def test_python_in_a_data_folder_would_be_seen(tmp_path):
    (tmp_path / "product").mkdir()
    (tmp_path / "product" / "__init__.py").touch()
    assert python_in(tmp_path) == ["product/__init__.py"]


@pytest.mark.parametrize("path", [p for n in ("factory", "train", "serve") for p in (ROOT / n).rglob("*.py")], ids=str)
def test_every_module_says_what_it_is_for(path):
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 20
