"""How are the notebooks run, so that what they store reads well where nothing is live, such as on a code host?

    python scripts/run_notebooks.py                              # all of notebooks/, in place
    python scripts/run_notebooks.py notebooks/quickstart.ipynb

A progress bar is stored as its last line, any other widget not at all; times, versions and machine paths are not stored.
"""

import html
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path) -> NotebookNode:
    """The notebook, run from top to bottom in a new kernel; raises at the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True, record_timing=False)
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:pkg_resources is deprecated:UserWarning"})
    return notebook


def freeze(notebook: NotebookNode) -> NotebookNode:
    """Turns progress bars into text, and drops what only shows while a kernel lives, or only here."""
    widgets = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [frozen for output in cell.outputs if (frozen := freeze_output(output, widgets))]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def freeze_output(output: NotebookNode, widgets: dict) -> NotebookNode | None:
    view = output.get("data", {}).get(VIEW)
    if view is None:
        return output
    text = bar_text(view["model_id"], widgets)
    return None if text is None else nbformat.v4.new_output("display_data", {"text/plain": text})


def bar_text(model_id: str, widgets: dict) -> str | None:
    """The line of a tqdm bar: what a box of a description, a bar and its counts shows; None for another widget."""
    children = [widgets[child.removeprefix("IPY_MODEL_")]["state"] for child in widgets[model_id]["state"].get("children", ())]
    if [child["_model_name"] for child in children] != ["HTMLModel", "FloatProgressModel", "HTMLModel"]:
        return None
    left, bar, right = children
    text = f"{left['value']}|{'█' * round(10 * bar['value'] / bar['max']):10}|{right['value']}"
    return html.unescape(text).replace("\N{FIGURE SPACE}", " ")


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(freeze(run(path)), path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
