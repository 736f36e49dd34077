"""The house's walls: who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The engine's rooms that compute with torch; everything else in it decides, and must work without torch.
BELOW_THE_LINE = (
    "engine.build",
    "engine.device_choice",
    "engine.device_limits",
    "engine.encoder.build",
    "engine.encoder.model",
    "engine.memory",
    "engine.pool_size",
    "engine.runner",
    "engine.attention",
    "engine.kernels",
    "engine.models",
    "engine.parallel",
    "engine.quantization",
    "engine.bench",
)
WEB = {"streamlit", "mlflow", "starlette", "fastapi", "uvicorn", "httpx", "openai", "plotly", "pandas"}
MAY_IMPORT_STREAMLIT = ("workbench.ui", "workbench.app", "pages")
MAY_IMPORT_UI = ("workbench.ui", "workbench.app", "pages")


def modules() -> dict[str, Path]:
    found = {}
    for room in ("engine", "workbench", "pages"):
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names that a module imports; without what stands under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import; name the module in full"
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(tree)
    return names


def within(name: str, rooms: tuple[str, ...] | set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


MODULES = modules()


def test_every_room_is_there():
    assert {
        "engine",
        "engine.scheduler",
        "engine.runner.model_runner",
        "workbench.app",
        "pages.playground",
    } <= set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_opens_with_its_purpose(name):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert docstring, f"{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if within(n, ("engine",))])
def test_engine_imports_nothing_of_the_workbench_or_the_web(name):
    bad = {i for i in imports(MODULES[name]) if within(i, {"workbench", "pages", *WEB})}
    assert not bad, f"{name} imports {sorted(bad)}"


@pytest.mark.parametrize(
    "name", [n for n in sorted(MODULES) if within(n, ("engine",)) and not within(n, BELOW_THE_LINE)]
)
def test_modules_above_the_line_import_no_torch(name):
    bad = {i for i in imports(MODULES[name], top_level_only=True) if within(i, {"torch", "triton"})}
    assert not bad, f"{name} imports {sorted(bad)}"


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if within(n, ("workbench", "pages"))])
def test_workbench_directions(name):
    found = imports(MODULES[name])
    if not within(name, MAY_IMPORT_STREAMLIT):
        assert not {i for i in found if within(i, {"streamlit"})}, f"{name} imports streamlit"
    if not within(name, MAY_IMPORT_UI):
        assert not {i for i in found if within(i, {"workbench.ui"})}, f"{name} imports the UI"
    assert not {i for i in found if within(i, {"pages"})}, f"{name} imports a page"


def test_importing_packages_loads_no_torch():
    code = (
        "import engine, workbench, workbench.host, workbench.settings, workbench.cli, sys;"
        "print(sorted(m for m in ('torch', 'triton', 'transformers', 'mlflow') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_imports_have_no_cycle():
    edges = {
        name: {
            m for i in imports(path, top_level_only=True) for m in (i, i.rpartition(".")[0]) if m in MODULES
        }
        - {name, name.split(".")[0]}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in done:
            return
        for target in sorted(edges[name]):
            walk(target, (*trail, name))
        done.add(name)

    for name in sorted(edges):
        walk(name, ())


def test_module_map_is_current():
    done = subprocess.run([sys.executable, "docs/module_map.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "AGENTS.md's module map is out of date: run `make map`"
