"""One row of the README's table a method: Omniglot, 5 ways, 1 shot, at equal meta-steps.

    python benchmarks/omniglot_5w1s.py --methods maml fomaml anil meta-sgd --seeds 0 1 --steps 1200 --split background

A method and seed take about 5 minutes on two cores. Each run's `result.json` is copied into `results/omniglot_5w1s/`; a result
that is there already is kept and its run left out.
"""

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

import jmeta as jm
from jmeta import presets
from jmeta.commands import training

RESULTS = Path(__file__).parent / "results" / "omniglot_5w1s"


def run(method: str, seed: int, steps: int, split: str, source: str | None) -> Path:
    """Trains and tests one method with one seed.

    Args:
      method: of the preset `METHOD-omniglot-5w1s`.
      seed: of everything.
      steps: meta-steps.
      split: Omniglot's classes.
      source: where Omniglot lies; looked up if None.

    Returns:
      The result's JSON file.
    """
    path = RESULTS / f"{method}-{split}-{steps}-seed{seed}.json"
    if path.exists():
        return path
    name = f"{method}-omniglot-5w1s"
    config = dataclasses.replace(presets.preset(name), seed=seed, steps=steps, split=split, source=source)
    with tempfile.TemporaryDirectory() as folder:
        done = training.train(config, Path(folder) / "run", name=name)
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done / "result.json", path)
    return path


def main() -> None:
    """Runs what the command line asks for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["maml", "fomaml", "anil", "meta-sgd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--split", choices=["customary", "background"], default="background")
    parser.add_argument("--source")
    asked = parser.parse_args()
    jm.use_cores()
    for method in asked.methods:
        for seed in asked.seeds:
            print(run(method, seed, asked.steps, asked.split, asked.source), flush=True)


if __name__ == "__main__":
    main()
