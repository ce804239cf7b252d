"""The documentation: a site that builds without a warning and reads without a network, examples that run, no name left out."""

import importlib
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import k_diffusion as K
import nbformat
import pytest
import torch

import ksag
from tests.test_same_image import LatentDiffusion

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Strict: a warning, such as a broken link, or a page or notebook that the menu lacks, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


# The site


class Loaded(HTMLParser):
    """The addresses that a page loads by itself."""

    def __init__(self, html):
        super().__init__()
        self.addresses = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses.append(attrs.get("href") if tag == "link" else attrs.get("src"))


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        addresses = [address for address in Loaded(text).addresses if address is not None]
        addresses += re.findall(r"""import\b[^;\n]*["'](https?:[^"']+)""", text)
        assert addresses
        for address in addresses:
            local = address.partition("#")[0].partition("?")[0]
            if page.name != "404.html" and not address.startswith("data:"):
                assert (page.parent / local).is_file(), f"{page.relative_to(site)} loads {address!r}"


def test_formulas_are_mathml(site):
    text = (site / "algorithm.html").read_text()
    source = (ROOT / "docs/algorithm.md").read_text()
    assert text.count('display="block"') == source.count("\n$$\n") // 2
    assert "<mfrac>" in text and "arithmatex" not in text and "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_its_stored_pictures(site, path):
    stored = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    shown = [a for a in Loaded((site / f"notebooks/{path.stem}.html").read_text()).addresses if f"{path.stem}_files/" in (a or "")]
    assert len(shown) == sum("image/png" in output.get("data", {}) for output in stored) > 0


def test_the_performance_page_has_the_table_of_the_gpu(site):
    first_cells = re.findall(r"^\| *(\w[\w ]*?) *\|", (ROOT / "docs/gpu.md").read_text(), re.M)
    text = (site / "performance.html").read_text()
    assert first_cells and all(f">{cell}</t" in text for cell in first_cells)


# The examples. (Those of diffusers.md run in test_diffusers.py; fragments, which cannot run alone, are marked py, not python.)


EXAMPLES = [
    pytest.param(code, id=f"{page}-{i}")
    for page in ("index", "families", "parameters", "samplers")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code):
    model = LatentDiffusion()
    c, uc = ({"c_crossattn": [torch.randn(1, 7, 64)]} for _ in range(2))
    names = {"model": model, "c": c, "uc": uc, "noise": torch.randn(1, 4, 8, 8)}
    names["sigmas"] = K.external.CompVisDenoiser(model).get_sigmas(3)
    exec(compile(code, "docs", "exec"), names)
    result = names.get("x", names.get("images"))
    assert result is None or result.isfinite().all()


# The names


def public(module):
    """The public names that a module defines."""
    defined = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return {name: value for name, value in defined.items() if not name.startswith("_")}


MODULES = (
    "samplers", "zoo", "adapters.diffusers", "plot", "explore", "picture",
    "attention", "conditioning", "degrade", "families", "saliency", "tap",
)  # fmt: skip
INSIDE = {"Settings", "Result", "Session", "Newest"}  # what ksag.explore.explore is made of
EXPORTED = {f"ksag.{name}": getattr(ksag, name) for name in ksag.__all__}
NAMES = EXPORTED | {
    f"ksag.{module}.{name}": value
    for module in MODULES
    for name, value in public(importlib.import_module(f"ksag.{module}")).items()
    if value not in EXPORTED.values() and name not in INSIDE
}


def test_every_public_name_is_in_the_api(site):
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    assert not [name for name in NAMES if f'id="{name}"' not in pages]


def functions(name, value):
    """A function, or a class with its public methods."""
    yield name, value
    for attribute, method in vars(value).items() if inspect.isclass(value) else ():
        if inspect.isfunction(method) and not attribute.startswith("_"):
            yield f"{name}.{attribute}", method


EXPLAINED = dict(pair for item in NAMES.items() for pair in functions(*item) if callable(item[1]))


@pytest.mark.parametrize("name", EXPLAINED)
def test_docstring(name):
    """There is one, and the arguments it explains are those that there are."""
    docstring = inspect.getdoc(EXPLAINED[name])
    assert docstring, f"{name} has no docstring"
    arguments = re.search(r"^Args:\n((?: +.*\n?)+)", docstring, re.M)
    if arguments:
        explained = ", ".join(re.findall(r"^    ([\w*, ]+):", arguments[1], re.M)).replace("*", "").split(", ")
        assert set(explained) <= set(inspect.signature(EXPLAINED[name]).parameters)
