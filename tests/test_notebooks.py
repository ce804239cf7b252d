"""The notebooks run, and what they store reads well where nothing is live."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path):
    return nbformat.read(path, as_version=4).cells


def outputs(path):
    return [output for cell in cells(path) if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_four():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"quickstart", "what_sag_sees", "choosing_parameters", "stable_diffusion"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path):
    NotebookClient(nbformat.read(path, as_version=4), timeout=300, kernel_name="python3").execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStored:
    def test_its_first_line_is_a_question(self, path):
        assert re.match(r"# .*\?$", cells(path)[0].source.splitlines()[0])

    def test_outputs_come_from_one_run(self, path):
        counts = [cell.execution_count for cell in cells(path) if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))

    def test_it_has_pictures_and_no_noise(self, path):
        assert any("image/png" in output.get("data", {}) for output in outputs(path))
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs(path))
        text = "".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs(path))
        assert not re.search(r"Warning|Traceback|/(home|root|tmp|work|usr)/", text)

    def test_its_text_is_written(self, path):
        assert not any(re.fullmatch(r"[A-Z]+\d*", cell.source.strip()) for cell in cells(path))

    def test_it_is_a_page_of_the_site(self, path):
        assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()


def test_the_quickstart_ends_with_the_widget():
    last = cells(ROOT / "notebooks/quickstart.ipynb")[-1]
    assert last.metadata.get("tags") == ["explore"] and "explore(guided" in last.source
