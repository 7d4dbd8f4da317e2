"""factory <- train, serve: those two stand on factory's ground floor alone, and not on each other.

Only factory/cli.py may reach up, and only inside a function.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"factory", "train", "serve"}
GROUND = {
    "errors",
    "yaml12",
    "paths",
    "schema",
    "store",
    "template",
    "seeds",
    "tokens",
    "llama",
    "progress",
    "gguf_file",
    "embed",
    "routing",
}
MODULES = [path for package in sorted(OURS) for path in sorted((ROOT / package).rglob("*.py"))]


def imported(nodes):
    """Dotted names of all that `nodes` import; `from factory import x` is factory.x."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inside = node.module in OURS
            yield from (f"{node.module}.{a.name}" for a in node.names) if inside else [node.module]


def outside_functions(tree):
    """All nodes that run, or are read, when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from outside_functions(node)


def wrong(package, source, may_reach_up=False):
    """The imports of one module that point the wrong way."""
    tree = ast.parse(source)
    found = []
    for name in imported(outside_functions(tree) if may_reach_up else ast.walk(tree)):
        root, _, rest = name.partition(".")
        allowed = {package, "factory"}
        too_high = package != "factory" and root == "factory" and rest.split(".")[0] not in GROUND
        if root in OURS and (root not in allowed or too_high):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    assert wrong(package, path.read_text(encoding="utf-8"), path == ROOT / "factory" / "cli.py") == []


@pytest.mark.parametrize(
    ("package", "source", "name"),
    [
        ("factory", "from train.sft import train", "train.sft"),
        ("factory", "def f():\n    import serve.engine", "serve.engine"),
        ("train", "from serve.engine import ask", "serve.engine"),
        ("serve", "import train", "train"),
        ("train", "from factory.build import build", "factory.build"),
        ("serve", "from factory import lint", "factory.lint"),
        ("train", "if True:\n    from factory.teacher.phrases import reword", "factory.teacher.phrases"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_seen(package, source, name):
    assert wrong(package, source) == [name]


def test_the_command_line_may_reach_up_inside_a_function_alone():
    inside, above = "def f():\n    from serve.engine import ask", "if 1:\n    from serve.engine import ask"
    assert wrong("factory", inside, may_reach_up=True) == []
    assert wrong("factory", above, may_reach_up=True) == ["serve.engine"]


def test_the_ground_floor_knows_no_other_floor():
    for name in GROUND:
        source = (ROOT / "factory" / f"{name}.py").read_text(encoding="utf-8")
        ours = {n.split(".")[1] for n in imported(ast.walk(ast.parse(source))) if n.startswith("factory.")}
        assert ours <= GROUND, name
