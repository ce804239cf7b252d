"""The notebooks run; their stored outputs come from one run, and read well without a kernel."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import k_diffusion as K
import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from nbformat import NotebookNode

from ksag import zoo
from scripts.run_notebooks import METADATA, freeze, run
from tests.diffusers_pipelines import stable_diffusion, stable_diffusion_xl
from tests.models import randomise

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TITLES = {
    "choosing_parameters": "Which parameters should I choose, and what do they cost?",
    "quickstart": "How do I sample with SAG, PAG and SEG?",
    "stable_diffusion": "How do I sample a Stable Diffusion pipeline with SAG and k-diffusion's samplers?",
    "what_sag_sees": "What do SAG, PAG and SEG see and change?",
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: NotebookNode) -> list[int]:
    """How many each code cell shows."""
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)]


def texts(notebook: NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(TITLES)


@each
def test_first_line_states_the_question(path):
    assert read(path).cells[0].source.splitlines()[0] == f"# {TITLES[path.stem]}"


@each
def test_stored_outputs_come_from_one_run(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each
def test_stored_outputs_hold_pictures_and_no_trouble(path):
    notebook = read(path)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert sum(pictures(notebook)) >= 2
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    for text in texts(notebook):
        assert not re.search(r"Traceback|Warning|Error\b", text), text


@each
def test_stored_outputs_show_without_a_kernel(path):
    """No widget and no half-drawn progress bar, but a picture of the widget."""
    notebook = read(path)
    assert not any("widget" in kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {}))
    for text in texts(notebook):
        assert "VBox(" not in text and "\r" not in text
        assert not re.match(r"[^|\n]*\b\d?\d%\|", text), text
    for cell, number in zip(code_cells(notebook), pictures(notebook), strict=True):
        assert number == 1 or "explore(" not in cell.source


@each
def test_stored_file_is_small_and_holds_nothing_of_the_machine(path):
    source = path.read_text()
    assert len(source) < 1.3e6
    assert not re.search(r"(?<![\w./:<>])/(?:home|root|work|tmp|usr|opt|Users|mnt|var)/", source)
    notebook = read(path)
    assert notebook.metadata == METADATA
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@each
def test_links_to_other_notebooks_lead_there(path):
    for target in re.findall(r"\]\(([^)]+\.ipynb)\)", "\n".join(cell.source for cell in read(path).cells)):
        assert (path.parent / target).exists(), target


@each
def test_it_is_a_page_of_the_site(path):
    assert f": notebooks/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()


def imported(notebook: NotebookNode) -> Iterator[str]:
    """The dotted names that its cells import."""
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code_cells(notebook)))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_public_names_of_what_ksag_and_its_extras_install():
    declared = set(re.findall(r'^  "([\w.-]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))  # a dependency a line
    installed = packages_distributions()
    for path in NOTEBOOKS:
        for name in imported(read(path)):
            package, *inner = name.split(".")
            owners = {owner.lower() for owner in installed.get(package, [package])}
            beside = (path.parent / f"{package}.py").is_file()
            assert package in sys.stdlib_module_names or owners & declared or beside, name
            assert not any(part.startswith("_") for part in inner), name


def test_stored_costs_are_those_of_the_method():
    """In 12 steps with two evaluations in one pass each, of one picture."""
    stored = "\n".join(texts(read(ROOT / "notebooks/choosing_parameters.ipynb")))
    found = re.findall(r"^(\S.*?) {2,}(\d+) +(\d+)$", stored, re.MULTILINE)
    costs = {label: (int(evaluations), int(passes)) for label, evaluations, passes in found}
    assert costs["plain"] == (24, 12)
    assert costs["SAG"] == (36, 24)
    assert costs["SAG, one_pass"] == (36, 12)
    assert costs["SAG, every=2"] == (30, 18)
    assert costs["SAG at σ 0.4 to 3"] == (26, 14)
    assert costs["PAG"] == (36, 12)
    assert costs["SAG + PAG"] == (48, 24)
    assert costs["SAG, one_pass + PAG"] == (48, 12)


def test_stable_diffusion_in_short(tmp_path):
    """The code before its first cell, as it stands, but for the weights and the GPU, which are not here, and the size."""
    stable_diffusion(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", read(ROOT / "notebooks/stable_diffusion.ipynb").cells[0].source, re.DOTALL)
    place = {"stable-diffusion-v1-5/stable-diffusion-v1-5": str(tmp_path / "pipe"), "float16": "float32", "64, 64": "8, 8"}
    for old, new in place.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(code.replace('"cuda"', '"cpu"'), "stable_diffusion.ipynb", "exec"), names)
    assert names["picture"].size == (16, 16)


@pytest.mark.slow
def test_stable_diffusion_shows_the_pipeline_at_path(tmp_path):
    stable_diffusion_xl(tmp_path)  # leaves it in tmp_path / "pipe"
    notebook = read(ROOT / "notebooks/stable_diffusion.ipynb")
    (cell,) = [cell for cell in code_cells(notebook) if cell.source.startswith("PATH = None")]
    cell.source = f"PATH = {str(tmp_path / 'pipe')!r}"
    nbformat.write(notebook, tmp_path / "with_path.ipynb")
    again = run(tmp_path / "with_path.ipynb")
    assert "This notebook shows: pipe." in "".join(texts(again))
    assert pictures(freeze(again)) == pictures(notebook)


STEPS = {"what_sag_sees": 4}
"""The fewest at which each direction acts, if its cells need that; else 2."""


def small_emoji_model(*args, **kwargs):
    """The bundled model's layers, with a few random channels."""
    config = json.loads(json.dumps(zoo.load_config()))
    config["model"] |= {"channels": [32] * len(config["model"]["channels"]), "mapping_out": 32}
    torch.manual_seed(0)
    model = randomise(K.config.make_model(config), std=0.1)
    return K.config.make_denoiser_wrapper(config)(model).eval().requires_grad_(False)


class Shell(InteractiveShell):
    """What runs the cells, in this process."""

    def enable_gui(self, gui=None):
        pass


@pytest.fixture(scope="module")
def shell():
    made = Shell.instance()
    made.run_line_magic("matplotlib", "inline")
    yield made
    Shell.clear_instance()


@pytest.mark.slow
@each
def test_notebook_runs_from_top_to_bottom_and_shows_what_is_stored(path, shell, monkeypatch):
    """In fewer steps, with a smaller model, and without a kernel of its own; the stored outputs are of a whole run."""
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(zoo, "load", small_emoji_model)
    shell.reset()
    notebook, shown, errors = read(path), set(), ""
    for cell in code_cells(notebook):
        with capture_output() as captured:
            result = shell.run_cell(re.sub(r"(get_sigmas_karras|get_sigmas)\(\d+", rf"\1({STEPS.get(path.stem, 2)}", cell.source))
        result.raise_error()
        if isinstance(result.result, Figure):
            shown.add(id(cell))
        for i, output in enumerate(captured.outputs):
            if "image/png" in output.data:
                shown.add((output.transient or {}).get("display_id", (id(cell), i)))  # a widget's picture is updated
        errors += captured.stderr
    assert len(shown) == sum(pictures(notebook))
    assert not re.search("Warning|Error", errors)
