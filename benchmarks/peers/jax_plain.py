"""MAML in JAX as people write it: Flax's own layers, `jax.grad` inside `jax.grad`, `jax.vmap` over tasks, all in one `jax.jit`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from peers import Arrays, Contender  # pyright: ignore[reportMissingImports]


class _Conv4(nn.Module):
    ways: int
    filters: int
    pool: bool

    @nn.compact
    def __call__(self, x):
        for number in range(1, 5):
            x = nn.Conv(self.filters, (3, 3), 1 if self.pool else 2, name=f"block{number}.conv")(x)
            norm = nn.BatchNorm(use_running_average=False, epsilon=1e-5, name=f"block{number}.norm")
            x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if self.pool else x
        x = x.reshape(len(x), -1) if self.pool else x.mean((1, 2))
        return nn.Dense(self.ways, name="head")(x)


class _Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in (1, 2):
            x = nn.relu(nn.Dense(40, name=f"layer{number}.dense")(x))
        return nn.Dense(1, name="head")(x)


def contenders(work, params: Arrays, episodes: tuple[np.ndarray, ...]) -> dict[str, Contender]:
    """One way: everything under `vmap`."""
    model = _Mlp() if work.network == "mlp" else _Conv4(work.ways, work.filters, work.network == "pooled")
    theta = unflatten_dict({tuple(name.replace("/", ".", name.count("/") - 1).split("/")): a for name, a in params.items()})
    statistics = jax.eval_shape(model.init, jax.random.key(0), episodes[0][0]).get("batch_stats", {})
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics)

    def outputs(theta, x):
        return model.apply({"params": theta, "batch_stats": statistics}, x, mutable=["batch_stats"])[0]

    def loss(theta, x, y):
        if work.network == "mlp":
            return jnp.mean((outputs(theta, x) - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs(theta, x), y).mean()

    def adapt(theta, x, y):
        for _ in range(work.steps):
            grads = jax.grad(loss)(theta, x, y)
            grads = grads if work.order == 2 else jax.lax.stop_gradient(grads)
            theta = jax.tree.map(lambda p, g: p - work.rate * g, theta, grads)
        return theta

    def query_loss(theta, support_x, support_y, query_x, query_y):
        return loss(adapt(theta, support_x, support_y), query_x, query_y)

    def accuracy(theta, support_x, support_y, query_x, query_y):
        return (outputs(adapt(theta, support_x, support_y), query_x).argmax(-1) == query_y).mean()

    def mean(function):
        def over_tasks(theta, episodes):
            results = jax.vmap(lambda *episode: function(theta, *episode))(*episodes)
            return jax.tree.map(lambda leaf: leaf.mean(0), results)

        return over_tasks

    def train(theta, episodes):
        value, grads = jax.value_and_grad(mean(query_loss))(theta, episodes)
        return {**grads, "loss": value}

    kinds = {
        "train": train,
        "adapt": mean(lambda theta, x, y, *_: adapt(theta, x, y)),
        "evaluate": lambda theta, episodes: {"accuracy": mean(accuracy)(theta, episodes)},
    }
    run = jax.jit(kinds[work.kind])
    arguments = jax.device_put((theta, episodes))
    return {"jax plain": Contender(lambda: jax.block_until_ready(run(*arguments)), read)}


def read(result) -> Arrays:
    """Arrays under jmeta's names."""
    return {name.replace(".", "/"): np.asarray(leaf) for name, leaf in flatten_dict(result, sep="/").items()}
