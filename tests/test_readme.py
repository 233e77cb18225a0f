"""The READMEs say what the results say, name what there is, and their code fits the functions that it calls."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jmeta as jm

ROOT = Path(__file__).parents[1]
SECTIONS = (ROOT / "README.md").read_text().split("\n## ")
CODE = {text.split("\n")[0]: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in SECTIONS if "```python" in text}
FIRST = "MAML in ten lines"
OTHERS = [name for name in CODE if name != FIRST]


def test_tables_are_what_the_results_make():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert "±" in table.omniglot() and "±" in table.sinusoid()
    for page in table.PAGES:
        text = page.read_text()
        assert "<!-- table: speed -->" in text and table.fill(text) == text


def test_names_exist():
    names = set(re.findall(r"\bjm\.([A-Za-z_]\w*)", (ROOT / "README.md").read_text()))
    assert len(names) > 50
    assert not [name for name in names if not hasattr(jm, name)]


def test_links_lead_somewhere():
    texts = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md")}
    titles = {path: {_anchor(title) for title in re.findall(r"(?m)^## (.*)$", text)} for path, text in texts.items()}
    links = [(path, *link) for path, text in texts.items() for link in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text)]
    assert len(links) > 30
    for path, file, title in links:
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), file
        assert not title or title in titles[target], title


def _anchor(title: str) -> str:
    """What a title's link is called."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The long functions check what they are given, and no more; data sets are noise."""

    def bound(name, short):
        own = inspect.signature(getattr(jm, name))
        monkeypatch.setattr(jm, name, lambda *args, **more: short(**own.bind(*args, **more).arguments))

    def fit(key, learner, tasks, outer, steps, **_):
        theta = learner.init(key)
        _, gradient, _ = jax.eval_shape(lambda: learner.grad(key, theta, tasks.draw(key), meta_step=0))
        jax.eval_shape(lambda gradient: outer.update(gradient, outer.init(theta), theta), gradient)
        return SimpleNamespace(theta=theta, history={"loss": jax.numpy.zeros(steps)})

    def fewshot(key, learner, theta, tasks, **_):
        jax.eval_shape(lambda: learner.curve(key, theta, tasks.draw(key)))

    def search(key, make_learner, theta, patterns, tasks, **_):
        fewshot(key, make_learner(patterns[1]), theta, tasks)

    def continual(model, theta, images, **_):
        jax.eval_shape(model.apply, theta.params, jax.numpy.zeros((1, *images.pixels.shape[1:])))

    for short in (fit, fewshot, search, continual):
        bound(short.__name__, short)
    bound("from_folder", lambda **_: _noise(80))
    bound("omniglot", lambda **_: jm.Splits(*[_noise(30)] * 3))
    monkeypatch.setattr(jm, "use_cores", lambda count: None)
    monkeypatch.chdir(tmp_path)


def _noise(classes: int) -> jm.Images:
    """Classes of 20 images, three groups of them."""
    labels = np.repeat(np.arange(classes), 20)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    return jm.from_arrays(pixels, labels, [f"{number % 3}/{number}" for number in range(classes)])


@pytest.mark.parametrize("section", OTHERS)
def test_a_section_goes_on_from_the_ten_lines_and_leaves_their_names(quick, section):
    names: dict = {}
    exec(CODE[FIRST][0], names)
    before = dict(names)
    for block in CODE[section]:
        exec(block, names)
    kinds = {name: (type(before[name]), type(names[name])) for name in before if name != "__builtins__"}
    assert not [name for name, (old, new) in kinds.items() if old is not new]
    assert all(before[name] is names[name] for name in ("key", "data", "train", "test", "learner"))
    assert jax.tree.structure(before["theta"]) == jax.tree.structure(names["theta"])


def test_there_are_sections_with_code():
    assert len(OTHERS) >= 6
