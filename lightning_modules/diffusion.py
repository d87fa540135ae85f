"""DDPM training of a class-conditional UNet (arXiv 2006.11239) with classifier-free guidance's label dropping.

The network predicts the velocity v = sqrt(a) noise - sqrt(1 - a) x0 (arXiv 2202.00512), a = alpha-bar_t. At the last
step, where the image has vanished, that is the mean image of the class, while the noise says nothing: sampling can
begin at pure noise (arXiv 2305.08891). From a network that predicts noise it has to begin a few steps later, where the
mean of the pixels still shows: pure noise then stands for images of medium grey, and digits on black come out on grey.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

__all__ = ["ClassConditionalDDPM", "default_widths", "make_unet"]

_GROUP = 4  # channels of a norm's group, at least


def default_widths(image_size: int) -> list[int]:
    """UNet channels for images of a size (our choice).

    32 at full resolution and twice as many after each halving, at most 256, down to about 8 pixels: [32, 64] for 8
    pixels, [32, 64, 128] for 28 and 32, [32, 64, 128, 256] for 64.
    """
    levels = max(2, round(math.log2(image_size / 8)) + 1)
    while image_size % 2 ** (levels - 1):
        levels -= 1
    return [min(32 * 2**level, 256) for level in range(levels)]


def make_unet(image_size: int, channels: int, num_classes: int, widths: list[int], layers: int = 1) -> UNet2DModel:
    """A UNet2DModel with one more class than the data: ``num_classes`` itself is the null class of free guidance.

    Args:
        image_size: pixels; divisible by 2 ** (len(widths) - 1).
        channels: image channels.
        num_classes: classes of the data.
        widths: channels per resolution; the resolution halves from one to the next. Attention at the lowest.
        layers: ResNet blocks per resolution.
    """
    levels = len(widths)
    if image_size % 2 ** (levels - 1):
        raise ValueError(
            f"widths {widths} halve the image {levels - 1} times, but {image_size} pixels are not divisible by "
            f"{2 ** (levels - 1)}; give fewer widths"
        )
    plain = levels - 1
    # Where a group is one channel, its norm takes out the channel's mean, which is where time and class may stand.
    groups = max(group for group in (32, 16, 8, 4, 2, 1) if group == 1 or all(_divides(group, w) for w in widths))
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers,
        block_out_channels=tuple(widths),
        down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
        norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",  # time and class come in behind the norm, not before it
        attention_head_dim=8 if all(width % 8 == 0 for width in widths) else None,
        num_class_embeds=num_classes + 1,
    )


def _divides(groups: int, width: int) -> bool:
    """Into groups of at least four channels."""
    return width % groups == 0 and width // groups >= _GROUP


class ClassConditionalDDPM(pl.LightningModule):
    """Predicts the velocity of a noised image; keeps an exponential moving average of the weights for sampling.

    Batches are images in [-1, 1], [N, C, H, W], and integer labels. A label is dropped (made the null class) with
    probability ``label_dropout``, so that the same network serves as the unconditional one (arXiv 2207.12598).
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        lr: float = 1e-3,
        label_dropout: float = 0.1,
        ema: float = 0.995,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.lr = lr
        self.label_dropout = label_dropout
        self.average = EMAModel(unet.parameters(), decay=ema)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The simple loss (arXiv 2006.11239, eq. 14), of the velocity (arXiv 2202.00512, appendix D)."""
        images, labels = batch
        null = self.unet.config.num_class_embeds - 1
        dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
        labels = torch.where(dropped, null, labels)
        noise = torch.randn_like(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=images.device)
        noised = self.scheduler.add_noise(images, noise, steps)
        velocity = self.scheduler.get_velocity(images, noise, steps)
        return nn.functional.mse_loss(self.unet(noised, steps, class_labels=labels).sample, velocity)

    def on_train_start(self) -> None:
        self.average.to(self.device)

    def optimizer_step(self, *arguments: Any, **more: Any) -> None:
        """The optimiser's step and the average's: a checkpoint has both, or neither."""
        super().optimizer_step(*arguments, **more)
        self.average.step(self.unet.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average.load_state_dict(checkpoint["average"])

    def configure_optimizers(self) -> dict[str, object]:
        """Adam with a cosine fall of the step over the whole training."""
        optimizer = torch.optim.Adam(self.unet.parameters(), lr=self.lr, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def averaged_unet(self) -> UNet2DModel:
        """The UNet with the averaged weights copied in."""
        self.average.copy_to(self.unet.parameters())
        return self.unet
