"""Imports point downward only: the floors of docs/architecture.md, read off the source."""

import ast
import pathlib

import pytest
from launched import run_python

import qwen3next_jax

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = {
    "command": 0, "config": 0, "data": 1, "ops": 1, "parallel": 2, "model": 3, "checkpoint": 4,
    "training": 5, "inference": 5, "evaluation": 6, "plan": 6, "sample": 6, "convert": 6,
    "launch": 6,
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "qwen3next_jax" and len(parts) > 1 else None


def files():
    package = ROOT / "qwen3next_jax"
    return [p for p in package.rglob("*.py") if p != package / "__init__.py"]


def test_every_module_is_on_a_floor():
    for path in files():
        name = path.relative_to(ROOT / "qwen3next_jax").parts[0].removesuffix(".py")
        assert name in FLOORS, f"{path} belongs to no floor; add it to the house and to FLOORS"


def test_imports_point_downward():
    for path in files():
        here = path.relative_to(ROOT / "qwen3next_jax").parts[0].removesuffix(".py")
        for module in imports(path):
            there = room(module)
            # The package's own names, `from qwen3next_jax import ops`, resolve to a room as well.
            if there in FLOORS and there != here:
                assert FLOORS[there] < FLOORS[here], (
                    f"{path} imports {module} from floor {FLOORS[there]}"
                )


def test_data_needs_no_jax():
    for path in (ROOT / "qwen3next_jax" / "data").glob("*.py"):
        assert not [m for m in imports(path) if m.split(".")[0] in ("jax", "flax")], path


@pytest.mark.parametrize(
    "module", ["train", "eval", "qwen3next_jax.launch", "qwen3next_jax.evaluation.report"]
)
def test_flags_and_configs_are_read_without_jax(module):
    run_python("-c", f"import sys, {module}; assert 'jax' not in sys.modules", check=True)


def test_the_package_has_the_names_it_lists_and_no_others():
    for name in qwen3next_jax.__all__:
        assert getattr(qwen3next_jax, name).__name__.rpartition(".")[2] == name
        assert name in dir(qwen3next_jax)
    with pytest.raises(AttributeError, match="no attribute 'Qwen3Nxt'"):
        _ = qwen3next_jax.Qwen3Nxt
