"""The notebooks have run from the top without an error, by names that jmeta has. They are too slow to run here."""

import json
import re
from pathlib import Path

import pytest

import jmeta as jm

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_they_are_found():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_run_whole_and_its_names_exist(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    text = "".join("".join(cell["source"]) for cell in cells)
    names = set(re.findall(r"\bjm\.([A-Za-z_]\w*)", text))
    assert names
    assert not [name for name in names if not hasattr(jm, name)]
    assert not [link for link in re.findall(r"\]\((\w[^):]*\.ipynb)\)", text) if not (FOLDER / link).exists()]
