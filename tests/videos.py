"""Complete tiny video pipelines of random weights, by the name of their architecture file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from helpers import WORDS, tiny_model, tiny_text_encoder, tiny_tokenizer, tiny_vae

FOUR = (8, 8, 8, 8)
# Arguments of a pipeline's call: nothing in these transformers says how large a video is.
SMALL = {"height": 16, "width": 16}


def _complete(kind: Any, transformer: Any, vae: Any, scheduler: Any, **more: Any) -> Any:
    torch.manual_seed(7)
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), **more}
    pipe = kind(transformer=transformer, vae=vae.eval(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latte() -> Any:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    return _complete(diffusers.LattePipeline, tiny_model("latte"), tiny_vae(), scheduler)


def cogvideox() -> Any:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    model = tiny_model("cogvideox", sample_width=2, sample_height=2, sample_frames=5, max_text_seq_length=16)
    return _complete(diffusers.CogVideoXPipeline, model, vae, diffusers.CogVideoXDDIMScheduler())


def _wan_vae() -> Any:
    torch.manual_seed(7)
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def wan() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _complete(diffusers.WanPipeline, tiny_model("wan"), _wan_vae(), scheduler)


def wan_of_two_experts() -> Any:
    """Wan 2.2 A14B: the second transformer takes over below ``boundary_ratio``."""
    return _complete(
        diffusers.WanPipeline, tiny_model("wan"), _wan_vae(), diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer_2=tiny_model("wan", seed=1), boundary_ratio=0.6,
    )  # fmt: skip


def hunyuanvideo() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, **ids, num_hidden_layers=1, projection_dim=64)).eval()
    llama = LlamaModel(LlamaConfig(**sizes, **ids, num_hidden_layers=2)).eval()
    return _complete(
        diffusers.HunyuanVideoPipeline, tiny_model("hunyuanvideo"), vae,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=llama, text_encoder_2=clip, tokenizer_2=tiny_tokenizer(),
    )  # fmt: skip


def ltx() -> Any:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=FOUR, decoder_block_out_channels=FOUR, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _complete(diffusers.LTXPipeline, tiny_model("ltx"), vae, scheduler)


def allegro() -> Any:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=FOUR, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    model = tiny_model("allegro", sample_height=2, sample_width=2, sample_frames=2)
    return _complete(diffusers.AllegroPipeline, model, vae, diffusers.EulerAncestralDiscreteScheduler())


def mochi() -> Any:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _complete(diffusers.MochiPipeline, tiny_model("mochi", in_channels=12), vae, scheduler)


def stdit() -> Any:
    from ditq.models.opensora import OpenSoraPipeline

    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    return _complete(OpenSoraPipeline, tiny_model("stdit"), tiny_vae(), scheduler)


def stdit3() -> Any:
    from ditq.models.opensora import OpenSora12Pipeline, OpenSoraVAE

    torch.manual_seed(7)
    vae = OpenSoraVAE(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, temporal_channels=(8, 8, 16, 16),
        temporal_layers=1, temporal_groups=4,
    )  # fmt: skip
    return _complete(OpenSora12Pipeline, tiny_model("stdit3"), vae, diffusers.FlowMatchEulerDiscreteScheduler())


def latte_class() -> Any:
    from ditq.models.latte_class import LatteClassPipeline

    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    pipe = LatteClassPipeline(tiny_vae(), tiny_model("latte-class"), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "latte": (latte, {}),
    "latte-class": (latte_class, {}),
    "stdit": (stdit, {}),
    "stdit3": (stdit3, {**SMALL, "num_frames": 7}),
    "cogvideox": (cogvideox, {"max_sequence_length": 16}),
    "wan": (wan, {**SMALL, "num_frames": 5, "max_sequence_length": 8}),
    "hunyuanvideo": (
        hunyuanvideo,
        {**SMALL, "num_frames": 5, "max_sequence_length": 8, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "ltx": (ltx, {"height": 32, "width": 32, "num_frames": 9}),
    "allegro": (allegro, {**SMALL, "num_frames": 8}),
    "mochi": (mochi, {**SMALL, "num_frames": 7}),
}
