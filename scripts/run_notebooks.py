"""Runs the notebooks and stores their outputs so that they read well without a kernel, such as on a code host.

    python scripts/run_notebooks.py                              # all of notebooks/, in place
    python scripts/run_notebooks.py notebooks/quickstart.ipynb

Of a progress bar the last line is stored, of any other widget the picture that it has for pages without a kernel. Figures have 256
colours, which makes them a fourth as large. Times, versions and paths of the machine are not stored.
"""

import base64
import html
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

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
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", coalesce_streams=True, record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},  # where Jupyter runs them too
    )  # fmt: skip
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:pkg_resources is deprecated:UserWarning"})
    return notebook


def freeze(notebook: NotebookNode) -> NotebookNode:
    """Turns widgets into text and pictures, and drops what is of this machine only."""
    widgets = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [frozen for output in cell.outputs if (frozen := freeze_output(output, widgets))]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def freeze_output(output: NotebookNode, widgets: dict) -> NotebookNode | None:
    data = output.get("data", {})
    view = data.pop(VIEW, None)
    if "image/png" in data:
        data["image/png"] = small(data["image/png"])
    elif view is not None:
        text = bar_text(view["model_id"], widgets)
        return None if text is None else nbformat.v4.new_output("display_data", {"text/plain": text})
    return output


def small(png: str) -> str:
    """A PNG in base64 with at most 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    file = io.BytesIO()
    # Pillow's default, the median cut, shifts hues
    few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def bar_text(model_id: str, widgets: dict) -> str | None:
    """The text of a tqdm bar, which is a box with a description, a bar and its counts; None for any other widget."""
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
