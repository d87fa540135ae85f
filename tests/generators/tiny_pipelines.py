"""Pipelines of random weights, as diffusers stores them: small enough for tests, loaded by the code for real ones."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Every letter is a token."""
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    for character in string.ascii_lowercase + string.digits:
        tokens += [character, f"{character}</w>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=24)


def text_pipeline(folder: Path) -> Path:
    """A Stable Diffusion pipeline of 16 x 16 pixels, with the scheduler of v1-5 and no safety checker."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.with_name(f"{folder.name}-vocabulary"))
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=24,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(str(folder))
    return folder


def dit_pipeline(folder: Path, names: list[str], classes: int) -> Path:
    """A DiT of 16 x 16 pixels with so many classes, the first of which have names."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=classes,
    )
    labels = {str(number): name for number, name in enumerate(names)}
    DiTPipeline(transformer, _vae(), DDIMScheduler(clip_sample=False), id2label=labels).save_pretrained(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))  # as on the hub
    return folder


def _unet(size: int, channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


def pixel_pipeline(folder: Path, **schedule: object) -> Path:
    """An unconditional UNet of 16 x 16 pixels."""
    torch.manual_seed(0)
    DDPMPipeline(_unet(16, 3), DDPMScheduler(clip_sample=False, **schedule)).save_pretrained(str(folder))
    return folder


def latent_pipeline(folder: Path) -> Path:
    """An unconditional UNet in the 8 x 8 latents of a VQ model of 16 x 16 pixels."""
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    LDMPipeline(vq, _unet(8, 3), DDIMScheduler(clip_sample=False)).save_pretrained(str(folder))
    return folder
