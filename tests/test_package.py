"""What a fresh machine relies on: dependencies, imports, versions, and the layout of the package."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import ksag
from ksag.commands import cli

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def imports(file):
    """The modules that a file imports anywhere."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def requirements():
    """Name → specifier of every package that pyproject.toml asks for, extras included."""
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    lines = re.findall(r'^  "([\w-]+)(?:\[\w+\])?([^":]*)"', project, re.M)
    return {name.lower().replace("_", "-"): specifier for name, specifier in lines if name != "ksag"}


def test_setuptools_has_pkg_resources():
    """Without which clip, and so k-diffusion, fails to import: setuptools 82 has none."""
    assert "<82" in requirements()["setuptools"]


def test_every_dependency_has_a_lower_bound():
    """scripts/oldest.sh installs and tests them."""
    assert len(requirements()) > 20
    assert not [name for name, specifier in requirements().items() if not re.match(r">=\d", specifier)]


def test_everything_imported_is_declared():
    owners = importlib.metadata.packages_distributions()
    foreign = {name.split(".")[0] for file in (ROOT / "ksag").rglob("*.py") for name in imports(file)}
    foreign -= {*sys.stdlib_module_names, "ksag"}
    assert foreign > {"torch", "torchvision", "PIL"}
    for name in foreign:
        packages = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
        assert packages & requirements().keys(), f"{name} is imported, but pyproject.toml does not ask for {packages}"


def test_import_ksag_is_light():
    heavy = {"k_diffusion", "click", "PIL", "torchvision", "tqdm", "safetensors", "diffusers", "matplotlib", "scipy"}
    result = python(f"import sys, torch; before = set(sys.modules); import ksag; print({heavy!r} & (set(sys.modules) - before))")
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


CORE = ("denoiser.py", "guidance/*.py", "attention/**/*.py", "model/*.py")


def test_the_core_imports_torch_and_einops_only():
    for pattern in CORE:
        files = sorted((ROOT / "ksag").glob(pattern))
        assert files, f"ksag/{pattern} is missing"
        for file in files:
            foreign = {i.split(".")[0] for i in imports(file)} - set(sys.stdlib_module_names) - {"torch", "einops", "ksag"}
            assert not foreign, f"{file} imports {foreign}"


def test_the_package_has_at_most_16_entries_and_no_long_file():
    package = ROOT / "ksag"
    entries = {file.relative_to(package).parts[0] for file in package.rglob("*") if "__pycache__" not in file.parts}
    assert len(entries) <= 16, sorted(entries)
    long = {str(file): lines for file in package.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 320}
    assert not long, long


def test_the_version_option_says_what_a_bug_report_needs():
    result = subprocess.run([sys.executable, "-m", "ksag", "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert lines["ksag"] == ksag.__version__ and lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    for name in ("torch", "torchvision", "k-diffusion", "diffusers"):
        assert lines[name] == importlib.metadata.version(name)


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(cli, "PACKAGES", ("no-such-package",))
    assert cli.versions().endswith("\nno-such-package not installed")


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "zoo" in block)
    names: dict = {}
    assert "get_sigmas_karras(24," in code
    exec(compile(code.replace("get_sigmas_karras(24,", "get_sigmas_karras(4,"), "README.md", "exec"), names)
    assert names["images"].shape == (2, 3, 64, 64) and 0.1 < names["images"].std() < 1
    assert (tmp_path / "emoji.png").stat().st_size > 1000


def test_every_file_that_these_pages_link_to_exists():
    for text in (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/coming-from.md", "docs/diffusers.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
            assert link.startswith("https://") or (text.parent / link).exists(), link


def test_the_version_is_in_the_changelog_and_the_citation():
    assert f"## {ksag.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {ksag.__version__}\n" in (ROOT / "CITATION.cff").read_text()
