"""Sine waves, 5 shots: test error after 1, 5 and 10 inner steps, beside the paper's 0.67, 0.38 and 0.35.

    python benchmarks/sinusoid.py        about 2 minutes on two cores

The paper trains with 10 shots, 1 inner step of rate 0.01 and meta-batches of 25 for 70,000 meta-steps and tests 600 waves with as
many points to be judged on as to learn from (Finn, Abbeel, Levine, ICML 2017, section 5.1). So here, but that the outer rate falls
along a cosine and that 2,000 waves are tested, since a few waves of large amplitude carry much of the error.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax

from jmeta import checkpoint, commands, presets, runs
from jmeta.evaluate.fewshot import fewshot

OUT = Path(__file__).parent / "results" / "sinusoid.json"
PAPER = {1: 0.67, 5: 0.38, 10: 0.35}


def main() -> None:
    """Trains each seed and writes the errors by inner step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=70_000)
    parser.add_argument("--preset", default="maml-sinusoid-10s")
    parser.add_argument("--episodes", type=int, default=2000)
    asked = parser.parse_args()
    found = [measure(asked.preset, seed, asked.steps, asked.episodes) for seed in asked.seeds]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(OUT, {"paper": PAPER, "versions": checkpoint.versions(), "runs": found})


def measure(name: str, seed: int, steps: int, episodes: int) -> dict:
    """Trains one seed of a preset and tests it with 5 shots."""
    config = dataclasses.replace(presets.preset(name), seed=seed, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        done = commands.train(config, Path(folder) / "run", name=name)
        learner, theta, _ = runs.load(done)
    problem = presets.make_problem(dataclasses.replace(config, shots=5, queries=5, test_queries=5))
    score = fewshot(jax.random.fold_in(jax.random.key(seed), 9), learner, theta, problem.test, episodes, metric=problem.metric)
    by_step = {step: {"mse": float(score.by_step[step, 0]), "interval95": float(score.by_step[step, 1])} for step in PAPER}
    print(f"seed {seed}: {by_step}", flush=True)
    return {"seed": seed, "episodes": episodes, "by_step": by_step, "config": dataclasses.asdict(config), "norm": "none"}


if __name__ == "__main__":
    main()
