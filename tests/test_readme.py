"""The READMEs say what the results say, and name what there is."""

import importlib.util
import re
from pathlib import Path

import jmeta as jm

ROOT = Path(__file__).parents[1]


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
