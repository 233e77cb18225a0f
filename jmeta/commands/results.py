"""What the commands share: how a run is read and scored, and what a result says."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jmeta import builders, checkpoint, presets, runs
from jmeta.builders import Problem
from jmeta.core import MetaLearner, Theta
from jmeta.evaluate.fewshot import Score, fewshot
from jmeta.presets import Config

TEST_KEY, EPISODE_KEY, ADAPT_KEY, SEARCH_KEY, ROUTING_KEY, SIZE_KEY = range(1, 7)  # folded into the seed's key after training's


def scored(config: Config, problem: Problem, theta: Theta, tasks: Any, episodes: int, seed: int, mesh: Mesh | None = None) -> Score:
    """What a test of a run measures."""
    key = jax.random.fold_in(jax.random.key(seed), TEST_KEY)
    learner = builders.make_learner(config, config.test_steps)
    return fewshot(key, learner, theta, tasks, episodes, metric=problem.metric, mesh=mesh)


def norm_of(config: Config) -> str:
    """The normalisation that stands beside a figure."""
    return "none" if config.dataset == "sinusoid" else config.norm


def described(config: Config, problem: Problem, score: Score) -> dict[str, Any]:
    """A result that can stand alone: figure, interval, episodes, normalisation, device, versions, config."""
    return {
        "metric": problem.metric_name,
        "mean": score.mean,
        "interval95": score.interval,
        "by_step": score.by_step.tolist(),
        "episodes": score.episodes,
        "transductive": score.transductive,
        "norm": norm_of(config),
        "versions": checkpoint.versions(),
        "config": dataclasses.asdict(config),
    }


def open_run(run: str) -> tuple[Config, MetaLearner, Theta]:
    """The configuration of a run, the learner that it was tested with, and what was learned."""
    learner, theta, _ = runs.load(run)
    return presets.from_dict(checkpoint.read_run(run)["config"], run), learner, theta
