"""What holds for the package as a whole: who imports whom, lint, public names, the test command."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vlp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_vlp"
FILES = sorted(PACKAGE.rglob("*.py"))
THIRD_PARTY_OF_MODELS = {"torch", "torchvision", "transformers", "tokenizers", "huggingface_hub"}
THIRD_PARTY_OF_MODELS |= {"numpy", "PIL", "safetensors"}
BRICKS_OF_DATA = [f"hf_vlp.models.{name}" for name in ("answers", "crops", "regions")]


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of every module, or name in a module, that a file imports anywhere."""
    package = ["hf_vlp", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imports_of(folder: str) -> dict[str, set[str]]:
    return {
        str(p.relative_to(PACKAGE)): imported_modules(p)
        for p in FILES
        if folder in p.relative_to(PACKAGE).parts
    }


def within(names: set[str], *parents: str) -> set[str]:
    return {name for name in names for parent in parents if (name + ".").startswith(parent + ".")}


def test_relative_imports_are_resolved():
    names = imported_modules(PACKAGE / "visualization" / "__init__.py")
    assert "hf_vlp.visualization.boxes.draw_boxes" in names


def test_models_are_flat_and_closed():
    folder = PACKAGE / "models"
    siblings = {p.stem for p in folder.glob("*.py")}
    assert not [p for p in folder.rglob("*.py") if p.parent != folder], "models/ must stay one flat folder"
    allowed = THIRD_PARTY_OF_MODELS | sys.stdlib_module_names
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, f"{path.name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert (node.level, node.module in siblings) == (1, True), (
                    f"{path.name}: not `from .sibling import`"
                )


@pytest.mark.parametrize("folder", ["data", "training"])
def test_data_and_training_know_no_model(folder):
    outside = [
        "hf_vlp.models",
        "hf_vlp.conversion",
        "hf_vlp.evaluation",
        "hf_vlp.visualization",
        "hf_vlp.quickstart",
    ]
    found = {
        file: within(names, *outside) - within(names, *BRICKS_OF_DATA)
        for file, names in imports_of(folder).items()
    }
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("folder", ["conversion", "evaluation", "visualization"])
def test_users_of_models_import_neither_data_nor_training(folder):
    outside = ["hf_vlp.data", "hf_vlp.training", "hf_vlp.quickstart"]
    assert {
        file: found for file, names in imports_of(folder).items() if (found := within(names, *outside))
    } == {}


def test_nobody_imports_the_command_line():
    assert [p.name for p in FILES if within(imported_modules(p), "hf_vlp.cli")] == []


def test_no_modeling_file_imports_that_of_another_paper():
    for path in (PACKAGE / "models").glob("modeling_*.py"):
        own = path.stem.split("_")[1]
        others = [n for n in imported_modules(path) if re.match(rf"hf_vlp\.models\.modeling_(?!{own})", n)]
        assert others == [], f"{path.name} imports {others}"


def test_public_names_are_importable():
    assert hf_vlp.__all__
    assert [name for name in hf_vlp.__all__ if not hasattr(hf_vlp, name)] == []


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_is_silent(arguments):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    done = subprocess.run([ruff, *arguments, "--no-cache", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_takes_its_command_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^pip install .*pytest.*$", readme, flags=re.M) == [
        'pip install -e ".[test]" && pytest'
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "sed -n '/^pip install .*pytest/p' README.md" in ci and 'eval "$command"' in ci
    assert "pytest" not in re.sub(r"sed -n .*", "", ci), "the command must stand in README.md alone"


def test_readme_shows_code_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("```") for line in lines[:30])
