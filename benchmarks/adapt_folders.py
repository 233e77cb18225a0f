"""How often `jmeta adapt` is right on folders of pictures: one folder for each of Omniglot's 20 evaluation alphabets.

    python benchmarks/adapt_folders.py RUN --source FOLDER        about 4 minutes on two cores

RUN is a 5-way run on the background split, so that no character of these alphabets was seen. A folder has 5 characters of one
alphabet, as PNG files of dark ink on paper, 105 x 105 pixels; `--shots` pictures of each to learn from and 10 to be judged on. The
command line is run as a user runs it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import jmeta as jm
from jmeta.checkpoint import versions, write_json

RESULTS = Path(__file__).parent / "results"
WAYS, QUERIES = 5, 10


def write_folders(images: jm.Images, alphabet: str, shots: int, rng: np.random.Generator, folder: Path) -> None:
    """Writes `support/NAME/*.png` and `query/NAME/*.png` for 5 characters of an alphabet."""
    from PIL import Image

    characters = [index for index, name in enumerate(images.names) if name.startswith(alphabet + "/")]
    for index in rng.choice(characters, WAYS, replace=False):
        drawings = images.start[index] + rng.permutation(images.count[index])[: shots + QUERIES]
        for number, drawing in enumerate(drawings):
            place = folder / ("support" if number < shots else "query") / images.names[index].split("/")[1]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - images.pixels[drawing, :, :, 0]).save(place / f"{number}.png")


def right(run: str, folder: Path) -> float:
    """The share of a folder's queries that `jmeta adapt` names rightly."""
    out = folder / "predictions.json"
    command = [sys.executable, "-m", "jmeta", "adapt", run, "--support", str(folder / "support"), "--query", str(folder / "query")]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return float(np.mean([row["truth"] == row["predicted"] for row in json.loads(out.read_text())]))


def main() -> None:
    """Writes, adapts, counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--source", help="Omniglot as a folder of tensorflow-datasets or of the official archives")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    images = jm.omniglot(asked.source, split="background", rotate=False, size=105).test
    rng, shares = np.random.default_rng(asked.seed), {}
    for alphabet in sorted({name.split("/")[0] for name in images.names}):
        with tempfile.TemporaryDirectory() as folder:
            write_folders(images, alphabet, asked.shots, rng, Path(folder))
            shares[alphabet] = right(asked.run, Path(folder))
        print(f"{alphabet}: {shares[alphabet]:.0%}", flush=True)
    values = np.array(list(shares.values()))
    interval = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    trained = json.loads((Path(asked.run) / "run.json").read_text())["config"]
    result = {"mean": values.mean(), "interval95": interval, "folders": shares, "shots": asked.shots, "seed": asked.seed}
    write_json(
        RESULTS / f"adapt_folders-{asked.shots}shot.json",
        {**result, "norm": trained["norm"], "versions": versions(), "config": trained},
    )
    print(f"{values.mean():.3f} ± {interval:.3f} (95 % interval over {len(values)} folders) [norm: {trained['norm']}]")


if __name__ == "__main__":
    main()
