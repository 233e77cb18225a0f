"""Sine waves, 5 shots: test error after 1, 5 and 10 inner steps, beside the paper's 0.67, 0.38 and 0.35.

    python benchmarks/sinusoid.py        about 2 minutes on two cores

The paper trains with 10 shots, 1 inner step of rate 0.01 and meta-batches of 25 for 70,000 meta-steps and tests 600 waves with as
many points to be judged on as to learn from (Finn, Abbeel, Levine, ICML 2017, section 5.1). So here, but that the outer rate falls
along a cosine and that 2,000 waves are tested, since a few waves of large amplitude carry much of the error.

On rare waves the inner descent diverges: 5 points, where training had 10, can make the loss too steep for its rate, and 10 steps,
where training had 1, are enough to leave. One such wave is all of a mean. So the mean over the others stands beside it, with how
many were left out: those whose error after the last step is above 25, the largest amplitude squared, so that 0 everywhere would
have been better.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jmeta import builders, checkpoint, presets, runs
from jmeta.commands import training

LARGEST = 5.0  # amplitude
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
        done = training.train(config, Path(folder) / "run", name=name)
        learner, theta, _ = runs.load(done)
    problem = builders.make_problem(dataclasses.replace(config, shots=5, queries=5, test_queries=5))

    @jax.jit
    @jax.vmap
    def errors(key):  # [steps + 1], of the episodes of `fewshot`
        key_task, key_learn = jax.random.split(key)
        task = problem.test.sample(key_task, ())
        return jax.vmap(lambda y: problem.metric(y, task.query.y))(learner.curve(key_learn, theta, task))

    key = jax.random.fold_in(jax.random.key(seed), 9)
    found = np.asarray(errors(jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(episodes))), np.float64)
    stays = found[:, -1] <= LARGEST**2
    result = {"by_step": _means(found), "diverged": int((~stays).sum()), "by_step_others": _means(found[stays])}
    print(f"seed {seed}: {result}", flush=True)
    return {"seed": seed, "episodes": episodes, **result, "config": dataclasses.asdict(config), "norm": "none"}


def _means(errors: np.ndarray) -> dict:
    """Mean and 95 % interval after some of the steps."""
    half = 1.96 * errors.std(0, ddof=1) / np.sqrt(len(errors))
    return {step: {"mse": float(errors[:, step].mean()), "interval95": float(half[step])} for step in PAPER}


if __name__ == "__main__":
    main()
