"""The SiT backbone as a model of diffusers: the same module and weight names, with its sizes in `config`."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from repa_scale.models.sit import SiT


@dataclass
class SiTOutput(BaseOutput):
    """sample: (N, C, H, W) velocity."""

    sample: Tensor


class SiTTransformer2DModel(ModelMixin, SiT, ConfigMixin):  # ConfigMixin last: it would hide torch's __getattr__
    """Velocity of a noisy latent. `save_pretrained` writes the public weight names.

    Args:
        sample_size: latent pixels an axis.
        num_classes: 0 for unlabelled data. The label `num_classes` is the null label.
    """

    _no_split_modules = ("SiTBlock",)
    _repeated_blocks = ("SiTBlock",)  # what `compile_repeated_blocks` compiles

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ) -> None:
        SiT.__init__(self, sample_size, patch_size, in_channels, depth, width, heads, num_classes, mlp_ratio, qk_norm)
        self._gradient_checkpointing_func = None

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> SiTOutput | tuple[Tensor]:
        """The velocity.

        Args:
            hidden_states: (N, C, H, W) float, the noisy latent x_t.
            timestep: (N,) float in [0, 1], 0 = data, 1 = noise.
            class_labels: (N,) int64; `num_classes` is the null label.
        """
        velocity, _ = SiT.forward(self, hidden_states, timestep, class_labels)
        return SiTOutput(sample=velocity) if return_dict else (velocity,)
