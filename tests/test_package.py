"""What a fresh machine relies on."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import ksag

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_k_diffusion_imports():
    """setuptools 82 has no pkg_resources, without which clip, and so k-diffusion, fails to import."""
    result = python("import k_diffusion")
    assert result.returncode == 0, result.stderr
    assert any(r.startswith("setuptools") and "<82" in r for r in importlib.metadata.requires("ksag") or [])


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
            tree = ast.parse(file.read_text())
            imports = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            imports += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            foreign = {i.split(".")[0] for i in imports} - set(sys.stdlib_module_names) - {"torch", "einops", "ksag"}
            assert not foreign, f"{file} imports {foreign}"


def test_the_package_has_at_most_16_entries_and_no_long_file():
    package = ROOT / "ksag"
    entries = {file.relative_to(package).parts[0] for file in package.rglob("*") if "__pycache__" not in file.parts}
    assert len(entries) <= 16, sorted(entries)
    long = {str(file): lines for file in package.rglob("*.py") if (lines := len(file.read_text().splitlines())) > 320}
    assert not long, long


def test_python_m_ksag():
    result = subprocess.run([sys.executable, "-m", "ksag", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and ksag.__version__ in result.stdout


def test_the_readmes_example_runs():
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "zoo" in block)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (2, 3, 64, 64) and 0.1 < names["images"].std() < 1


def test_every_file_that_the_readme_links_to_exists():
    for text in ROOT / "README.md", ROOT / "docs/coming-from.md", ROOT / "docs/diffusers.md":
        for link in re.findall(r"\]\(([^)#]+)\)", text.read_text()):
            assert link.startswith("https://") or (text.parent / link).exists(), link


def test_the_version_is_in_the_changelog():
    assert f"## {ksag.__version__}" in (ROOT / "CHANGELOG.md").read_text()
