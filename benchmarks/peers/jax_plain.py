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

    def loss(theta, x, y):
        outputs, _ = model.apply({"params": theta, "batch_stats": statistics}, x, mutable=["batch_stats"])
        if work.network == "mlp":
            return jnp.mean((outputs - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    def task_loss(theta, support_x, support_y, query_x, query_y):
        for _ in range(work.steps):
            grads = jax.grad(loss)(theta, support_x, support_y)
            grads = grads if work.order == 2 else jax.lax.stop_gradient(grads)
            theta = jax.tree.map(lambda p, g: p - work.rate * g, theta, grads)
        return loss(theta, query_x, query_y)

    def batch_loss(theta, episodes):
        return jax.vmap(lambda *episode: task_loss(theta, *episode))(*episodes).mean()

    run = jax.jit(jax.value_and_grad(batch_loss))
    arguments = jax.device_put((theta, episodes))
    return {"jax plain": Contender(lambda: jax.block_until_ready(run(*arguments)), read)}


def read(result) -> tuple[float, Arrays]:
    """Loss and gradients under jmeta's names."""
    loss, grads = result
    return float(loss), {name.replace(".", "/"): np.asarray(g) for name, g in flatten_dict(grads, sep="/").items()}
