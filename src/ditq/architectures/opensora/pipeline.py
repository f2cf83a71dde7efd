"""Open-Sora v1.0 text to video, of parts that diffusers has: T5, the VAE of Stable Diffusion, and its samplers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

GUIDED = 3  # channels of the noise that guidance acts on; as published, the others are the conditional half's


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """``frames``: lists of pictures, or what ``output_type`` asks for."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):
    """Text to video with :class:`ditq.architectures.opensora.STDiT`.

    The published sampler is that of improved DDPM in 100 steps: ``DDPMScheduler(beta_schedule="linear",
    variance_type="learned_range", clip_sample=False)``. A scheduler without learned variance takes the noise only.
    Prompts are lower-cased; the published code also removes web addresses and markup.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        """T5's output [n, length, channels] and mask [n, length] of prompts."""
        found = self.tokenizer(
            [p.lower().strip() for p in prompt], padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.transformer.config.model_max_length,
        ).to(self._execution_device)  # fmt: skip
        text = self.text_encoder(found.input_ids, attention_mask=found.attention_mask)[0]
        return text.to(self.transformer.dtype), found.attention_mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Videos of the size that the transformer was trained on, unless ``height``, ``width``, ``num_frames`` say."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self._execution_device
        trained: tuple[int, ...] = tuple(self.transformer.config.input_size)
        sides = [
            n if given is None else given // self.vae_scale_factor
            for given, n in zip((height, width), trained[1:], strict=True)
        ]
        shape = (len(prompts), self.transformer.config.in_channels, num_frames or trained[0], *sides)
        text, mask = self.encode_prompt(prompts)
        guided = guidance_scale > 1
        if guided:  # no prompt is a text of its own, as long as the prompt's
            nothing = self.transformer.y_embedder.y_embedding.to(text).expand_as(text)
            text, mask = torch.cat([text, nothing]), torch.cat([mask, mask])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=text.dtype)
            latents = latents * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        learned = getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range")
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for t in self.scheduler.timesteps:
                both = torch.cat([latents, latents]) if guided else latents
                noise = self.transformer(
                    hidden_states=self.scheduler.scale_model_input(both, t), timestep=t.expand(len(both)),
                    encoder_hidden_states=text, encoder_attention_mask=mask, return_dict=False,
                )[0]  # fmt: skip
                if guided:
                    noise, other = noise.chunk(2)
                    least = other[:, :GUIDED]
                    first = least + guidance_scale * (noise[:, :GUIDED] - least)
                    noise = torch.cat([first, noise[:, GUIDED:]], dim=1)
                if not learned:
                    noise = noise.chunk(2, dim=1)[0]
                latents = self.scheduler.step(noise, t, latents, **options, return_dict=False)[0]
                bar.update()
        frames: Any = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        """Each frame by itself."""
        frames = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        pictures = torch.cat([self.vae.decode(frame, return_dict=False)[0] for frame in frames.split(1)])
        video = pictures.unflatten(0, (len(latents), -1)).transpose(1, 2)
        return self.video_processor.postprocess_video(video.float(), output_type=output_type)
