"""The other side of `speed.py`: one module for each way of computing MAML without jmeta.

A module has `contenders(work, params, episodes) -> {name: Contender}` and imports what it needs at its top, so that a peer which is
not installed is named as missing. `params` are NumPy arrays under names such as `block1/conv/kernel`, kernels HWIO; `episodes` are
`(support x, support y, query x, query y)`, each with a leading axis of tasks, images NHWC. Arrays come back in the same layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Contender(NamedTuple):
    """One implementation: `run()` waits for its result, of which `read(result)` makes `{name: array}`.

    For `work.kind` "train" these are the gradients of the mean query loss and, as "loss", that loss; for "adapt" the means over the
    tasks of the adapted parameters; for "evaluate" the mean query accuracy after adaptation, as "accuracy"; for "asb" the
    parameters after the last episode.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Arrays]
