"""Layers of a network by name: at the top level of its parameters, or further down by a path such as "w/head"."""

from collections.abc import Mapping
from typing import Any

from jmeta.core import Params


def path_of(params: Params, name: str) -> list[str]:
    """The names that lead to a layer; one at the top level may hold slashes itself."""
    return [name] if name in params else name.split("/")


def layer_of(params: Params, name: str, who: str) -> Any:
    """The parameters of a layer.

    Raises:
      ValueError: it is not there; `who` begins the message.
    """
    own: Any = params
    for part in path_of(params, name):
        if not isinstance(own, Mapping) or part not in own:
            there = ", ".join(map(str, own)) if isinstance(own, Mapping) else "nothing below"
            raise ValueError(f"{who}: {name!r} is not a layer of the parameters; they have {there}.")
        own = own[part]
    return own


def with_layers(params: Params, layers: Mapping[str, Any]) -> Params:
    """The parameters with other values for some layers, which must be there."""
    for name, layer in layers.items():
        params = _with(params, path_of(params, name), layer)
    return params


def _with(params: Params, path: list[str], layer: Any) -> Params:
    first, *rest = path
    return {**params, first: _with(params[first], rest, layer) if rest else layer}
