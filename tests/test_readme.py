"""The READMEs say what the results say."""

import importlib.util
from pathlib import Path

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
