"""The documentation: a site that builds without a warning and reads without a network, examples that run, no name left out."""

import ast
import importlib
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path

import k_diffusion as K
import nbformat
import pytest
import torch

import ksag.attention.families
import ksag.explore
from tests.diffusers_pipelines import stable_diffusion
from tests.models import LatentDiffusion, make_denoiser

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# The site


class Parsed(HTMLParser):
    """What a page loads by itself, and what its pictures show to those who do not see them."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.alternative_texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses.append(attrs.get("href") if tag == "link" else attrs.get("src"))
        if tag == "img":
            self.alternative_texts.append(attrs.get("alt"))


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        addresses = [address for address in Parsed(text).addresses if address is not None]
        addresses += re.findall(r"""import\b[^;\n]*["'](https?:[^"']+)""", text)
        assert addresses
        for address in addresses:
            local = address.partition("#")[0].partition("?")[0]
            if page.name != "404.html" and not address.startswith("data:"):
                assert (page.parent / local).is_file(), f"{page.relative_to(site)} loads {address!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["algorithm", "guidance-rules"])
def test_formulas_are_mathml(site, page):
    text = (site / f"{page}.html").read_text()
    source = (ROOT / f"docs/{page}.md").read_text()
    assert text.count('display="block"') == source.count("\n$$\n") // 2
    assert "<mfrac>" in text and "arithmatex" not in text and "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_its_stored_pictures(site, path):
    stored = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    shown = [a for a in Parsed((site / f"notebooks/{path.stem}.html").read_text()).addresses if f"{path.stem}_files/" in (a or "")]
    assert len(shown) == sum("image/png" in output.get("data", {}) for output in stored) > 0


@pytest.mark.slow
def test_every_picture_has_an_alternative_text(site):
    texts = [text for page in site.rglob("*.html") for text in Parsed(page.read_text()).alternative_texts]
    assert len(texts) > 10 and all(text and len(text) > 20 for text in texts), texts


@pytest.mark.slow
def test_the_search_finds_no_progress_bars(site):
    index = (site / "search/search_index.json").read_text()
    assert "What do SAG, PAG and SEG see" in index and "█" not in index and not re.search(r"\d%\|", index)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_nothing_installs_from_an_index_that_ksag_is_not_on(name):
    assert not re.search(r"pip install ['\"]?ksag\b(?!-)", (ROOT / name).read_text())


@pytest.mark.slow
def test_the_performance_page_has_the_table_of_the_gpu(site):
    first_cells = re.findall(r"^\| *(\w[\w ]*?) *\|", (ROOT / "docs/gpu.md").read_text(), re.M)
    text = (site / "performance.html").read_text()
    assert first_cells and all(f">{cell}</t" in text for cell in first_cells)


# The examples, those of a page one after the other. (Those of diffusers.md run in test_diffusers.py; fragments, which cannot run
# alone, are marked py, not python.)


@pytest.fixture
def families(monkeypatch):
    """The families, for a page that adds one to them."""
    monkeypatch.setattr(ksag.attention.families, "FAMILIES", list(ksag.attention.families.FAMILIES))


def examples(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S))


def in_few_steps(code):
    return re.sub(r"(karras\(|get_sigmas\()\d+", r"\g<1>4", code)


def run(code):
    """What the examples of a page define, run one after the other in four steps."""
    model = LatentDiffusion()
    c, uc = ({"c_crossattn": [torch.randn(1, 7, 64)]} for _ in range(2))
    names = {"model": model, "c": c, "uc": uc, "noise": torch.randn(1, 4, 8, 8)}
    names["sigmas"] = K.external.CompVisDenoiser(model).get_sigmas(3)
    exec(compile(in_few_steps(code), "docs", "exec"), names)
    for name in {"x", "images"} & names.keys():
        assert names[name].isfinite().all()
    return names


@pytest.mark.parametrize("page", ["index", "parameters", "samplers", "directions"])  # two more pages run below
def test_examples_run(page, families):
    code = examples(page)
    assert code
    run(code)


OTHERS = (pytest.param(0, id="zoo", marks=pytest.mark.slow), pytest.param(2, id="a denoiser of your own", marks=pytest.mark.slow))


@pytest.mark.parametrize("which", [pytest.param(1, id="diffusers"), *OTHERS])
def test_the_figures_and_the_widget_work_on(which, tmp_path, monkeypatch):
    """The examples of api/notebook.md, at four steps."""
    opened = []

    class Recorded(ksag.explore.explore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(ksag.explore, "explore", Recorded)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api/notebook.md").read_text(), re.S)
    start = blocks[0].split("\n\nguided")[0]
    code = [blocks[0], *(f"{start}\n{block}" for block in blocks[1:])][which]
    names = {"pipe": stable_diffusion(tmp_path), "denoiser": make_denoiser()}
    exec(compile(in_few_steps(code), "docs", "exec"), names)
    (widget,) = opened
    assert widget.wait(120) and widget.result is not None and not widget.error
    widget.close()


def test_the_family_of_your_own_is_read_and_checked(families, capsys):
    names = run(examples("families"))
    assert "attention checked" in repr(names["guided"])
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs/families.md").read_text(), re.S)
    assert capsys.readouterr().out.endswith(shown)


def test_a_wrong_reading_by_a_family_of_your_own_is_an_error(families):
    right = "return Attention(q, k, v,"
    code = examples("families")
    assert code.count(right) == 1
    with pytest.raises(ValueError, match=r"'blocks\.1\.0' \(Looking\) is read as my Looking, but"):
        run(code.replace(right, "return Attention(k, q, v,"))


@pytest.mark.slow
def test_the_rule_of_your_own_guides_between_its_noise_levels():
    names = run(examples("guidance-rules"))
    guided, args, x = names["guided"], names["extra_args"], torch.randn(2, 3, 64, 64)
    assert guided.cfg_rule is names["interval"]

    def denoised(sigma, rule, **options):
        guided.cfg_rule = rule
        return guided(x * sigma, torch.full((2,), sigma), **{**args, **options}, sag_scale=0.0)

    assert torch.equal(denoised(2.0, names["interval"]), denoised(2.0, ksag.cfg.plain))
    outside = denoised(9.0, names["interval"])
    torch.testing.assert_close(outside, denoised(9.0, ksag.cfg.plain, cond_scale=1.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outside, denoised(9.0, ksag.cfg.plain), atol=1e-3)


# The packages

LEVELS = (
    ("commands/", "explore.py", "plot.py"),
    ("evaluate/", "zoo/", "adapters/", "images.py", "samplers.py"),
    ("flow.py",),
    ("denoiser.py",),
    ("guidance/",),
    ("attention/",),
    ("model/",),
)
"""Of docs/where-to-put.md: a package imports those below it, and those beside it."""
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def level_of(path):
    first, *inside = path.relative_to(ROOT / "ksag").parts
    return LEVEL_OF[f"{first}/" if inside else first]


def imported(path):
    """The files of ksag that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            base = ROOT / module.replace(".", "/")
            yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


FILES = [path for path in (ROOT / "ksag").rglob("*.py") if path.parent != ROOT / "ksag" or not path.name.startswith("__")]


def test_imports_run_downwards():
    upwards = [
        (path.name, other.name) for path in FILES for other in imported(path) if other in FILES and level_of(other) < level_of(path)
    ]
    assert not upwards


def test_the_page_lists_every_package():
    text = (ROOT / "docs/where-to-put.md").read_text().split("## The packages")[1]
    assert set(re.findall(r"`ksag/([^`]+)`", text)) == LEVEL_OF.keys()


def test_every_place_that_the_page_names_exists():
    places = re.findall(r"`((?:ksag|tests|scripts)/[^`]*)`", (ROOT / "docs/where-to-put.md").read_text())
    assert places and not [place for place in places if not (ROOT / place).exists()]


# The names


MODULES = (
    "samplers", "zoo", "adapters.diffusers", "plot", "explore", "images", "evaluate", "evaluate.features",
    "attention.find", "attention.families", "attention.families.family", "attention.families.sdpa", "attention.visit",
    "attention.saliency", "attention.check", "attention.tap", "guidance.blur", "model.compiled", "model.conditioning",
)  # fmt: skip
INSIDE = {"Settings", "Result", "Sampling", "Kept", "has_modules"}  # what others are made of


def public(module):
    """The public names that a module defines, or that a package takes from a module of its own that has no page."""
    exported = getattr(module, "__all__", ())
    without_page = {
        name: value
        for name, value in vars(module).items()
        if (where := getattr(value, "__module__", None)) == module.__name__
        or (name in exported and where and where.startswith(f"{module.__name__}.") and where.removeprefix("ksag.") not in MODULES)
    }
    return {name: value for name, value in without_page.items() if not name.startswith("_")}


EXPORTED = {f"ksag.{name}": getattr(ksag, name) for name in ksag.__all__}
NAMES = EXPORTED | {
    f"ksag.{module}.{name}": value
    for module in MODULES
    for name, value in public(importlib.import_module(f"ksag.{module}")).items()
    if value not in EXPORTED.values() and name not in INSIDE
}


@pytest.mark.slow
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
        explained = ", ".join(re.findall(r"^    ([\w*][\w*, ]*):", arguments[1], re.M)).replace("*", "").split(", ")
        assert set(explained) <= set(inspect.signature(EXPLAINED[name]).parameters)
