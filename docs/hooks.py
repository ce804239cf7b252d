"""What mkdocs needs to build this site: notebooks as pages, formulas that read without a script or a network, modules' examples."""

import ast
import html
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import math_core
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
"""What pymdownx.arithmatex makes of $...$ and $$...$$."""

PROGRESS = re.compile(r"[^\n]*\d%\|.*\|")
"""A progress bar, as scripts/run_notebooks.py stores it."""

to_mathml = math_core.LatexToMathML().convert_with_local_state


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds notebooks/NAME.ipynb as notebooks/NAME.md, with its stored outputs. (mkdocs-jupyter loads scripts from a CDN.)"""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.setdefault("language_info", {"name": "python"})  # how its code is highlighted
        without_progress_bars(notebook)
        body, resources = MarkdownExporter().from_notebook_node(notebook, resources=resources)
        for text in alternative_texts(notebook):
            body = body.replace("![png](", f"![{text}](", 1)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_page(body)))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def without_progress_bars(notebook: nbformat.NotebookNode) -> None:
    """They say nothing on a page, and would be found by its search."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not PROGRESS.match(output.get("data", {}).get("text/plain", ""))]


FIGURES = {
    "plot.compare(": "rows of samples, side by side",
    "plot.trace(": "what each direction computed, a column for each of some steps",
    "plot.xyz(": "samples, a cell for each setting",
    "show(": "saliency over the pictures, layer by layer",
    "ax.plot(": "curves over sigma",
    "explore(": "the widget's pictures, without the directions and with them",
}


def alternative_texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Of its figures, in order: the code that draws it, and the heading above it."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next((line.lstrip("# ") for line in reversed(cell.source.split("\n")) if line.startswith("#")), heading)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                kind = next((text for call, text in FIGURES.items() if call in cell.source), "figure")
                yield f"{heading}: {kind}".replace("`", "")


def as_page(body: str) -> str:
    """A notebook's links to the documentation and to other notebooks, as those between pages."""
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", body.replace("](../docs/", "](../"))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Renders the formulas as MathML. A formula that cannot be rendered ends the build with an error that shows it."""
    return FORMULA.sub(lambda match: to_mathml(html.unescape(match[2]), displaystyle=match[1] == "div"), content)


class Examples(griffe.Extension):
    """Shows as Python what a docstring has of it: doctests, indented lines, and a module's, which its formatter does not let stand
    indented.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(fenced(text, "" if obj.is_module else "    ") for text in paragraphs)


def fenced(paragraph: str, indent: str) -> str:
    if paragraph.startswith(">>>"):
        return "```pycon\n" + re.sub(r" *# doctest:.*", "", paragraph) + "\n```"
    code = textwrap.dedent(paragraph)
    return f"```python\n{code}\n```" if paragraph.startswith(indent) and is_python(code) else paragraph


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
