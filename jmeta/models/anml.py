"""ANML's network: a prediction network whose last map is gated by a neuromodulating one.

    logits = head(blocks(x) * sigmoid(gate(gate blocks(x))))

References:
  Beaulieu et al., Learning to Continually Learn, ECAI 2020 (https://arxiv.org/abs/2002.09571), section 3.

Differs from the paper in: normalisation is "instance", which is what its code's batch norm over single images amounts to; images
have one channel, not three equal ones. Its last gating map is not pooled, as in the paper's code; the code of zapping pools it.
"""

import flax.linen as nn

from jmeta.core import Model, memoise
from jmeta.models.backbones import Unpadded, build, check, torch_dense
from jmeta.models.layers import Norm


class _Anml(nn.Module):
    classes: int
    filters: int
    gate_filters: int
    norm: Norm

    @nn.compact
    def __call__(self, x):
        g = x
        for number in range(1, 4):
            g = Unpadded(self.gate_filters, self.norm, number < 3, name=f"gate_block{number}")(g)
        for number in range(1, 4):
            x = Unpadded(self.filters, self.norm, number < 3, name=f"block{number}")(x)
        x = x.reshape(x.shape[0], -1)
        gate = nn.sigmoid(torch_dense(x.shape[-1], "gate")(g.reshape(g.shape[0], -1)))
        return torch_dense(self.classes, "head")(x * gate)


@memoise
def anml_net(
    classes: int,
    *,
    filters: int = 256,
    gate_filters: int = 112,
    shape: tuple[int, int, int] = (28, 28, 1),
    norm: Norm = "instance",
) -> Model:
    """ANML's network, for `jmeta.anml`.

    Args:
      classes: outputs of the head.
      filters: channels of the prediction network's blocks.
      gate_filters: channels of the neuromodulating network's blocks.
      shape: height, width and channels of an image.
      norm: see `jmeta.models.layers.normalise`.

    Returns:
      A model with layers gate_block1 to gate_block3, gate, block1 to block3 and head.

    Raises:
      ValueError: a size is below 1 or the norm is unknown.
    """
    check("anml_net", {"classes": classes, "filters": filters, "gate_filters": gate_filters}, norm, shape, 3)
    names = (*(f"gate_block{number}" for number in range(1, 4)), "gate", *(f"block{number}" for number in range(1, 4)), "head")
    return build(_Anml(classes, filters, gate_filters, norm), shape, names, norm)
