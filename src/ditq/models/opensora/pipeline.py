"""Text-to-video pipelines of Open-Sora v1.0 and v1.2, with T5 and schedulers of diffusers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ditq.models.pipeline import Generators, VideoPipeline

IMAGE_FPS = 120  # the frame rate that v1.2 gets as input for a single image


class OpenSoraPipeline(VideoPipeline):
    """Text to video with :class:`ditq.models.opensora.STDiT`, and the VAE of Stable Diffusion.

    The published sampler is improved DDPM with 100 steps: ``DDPMScheduler(beta_schedule="linear",
    variance_type="learned_range", clip_sample=False)``. A scheduler without learned variance ignores the predicted
    variance. Prompts are lower-cased; the published code also removes web addresses and markup.
    """

    GUIDED = 3  # as published

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self._assembled(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def encode_prompt(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        """T5's output [n, length, channels] and mask [n, length] for prompts."""
        tokens = self.tokenizer(
            [p.lower().strip() for p in prompt], padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.transformer.config.model_max_length,
        ).to(self._execution_device)  # fmt: skip
        text = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return text.to(self.transformer.dtype), tokens.attention_mask

    def _text(self, prompt: list[str], guided: bool) -> dict[str, Tensor]:
        """The transformer's text inputs; with guidance, followed by empty texts of the same length as the prompts."""
        text, mask = self.encode_prompt(prompt)
        if guided:
            no_prompt = self.transformer.y_embedder.y_embedding.to(text).expand_as(text)
            text, mask = torch.cat([text, no_prompt]), torch.cat([mask, mask])
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates videos. ``height``, ``width`` and ``num_frames`` default to the transformer's training size."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        trained: tuple[int, ...] = tuple(self.transformer.config.input_size)
        sides = [
            n if pixels is None else pixels // self.vae_scale_factor
            for pixels, n in zip((height, width), trained[1:], strict=True)
        ]
        shape = (len(prompts), self.transformer.config.in_channels, num_frames or trained[0], *sides)
        inputs = self._text(prompts, guidance_scale > 1)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        return self._video(shape, inputs, guidance_scale, generator, latents, output_type, return_dict)


class OpenSora12Pipeline(OpenSoraPipeline):
    """Text to video with STDiT3 and OpenSoraVAE of ``ditq.models.opensora``.

    The published sampler is Euler's with 30 steps on a rectified flow: ``FlowMatchEulerDiscreteScheduler()``. The
    pipeline sets its shift for the size of each video, see :func:`flow_shift`.
    """

    GUIDED = 4

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        height: int = 240,
        width: int = 426,
        num_frames: int = 51,
        fps: float = 24.0,
        aesthetic_score: float | None = 6.5,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates videos. ``num_frames`` can be any number; the VAE decodes 17 frames at a time.

        Args:
            fps: frames per second, an input of the transformer.
            aesthetic_score: appended to prompts that do not name a score, as in training; None appends nothing.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if aesthetic_score is not None:
            prompts = [
                p if "aesthetic score:" in p else f"{p} aesthetic score: {aesthetic_score:.1f}." for p in prompts
            ]
        device = self._execution_device
        inputs = self._text(prompts, guidance_scale > 1)
        sizes = {"fps": fps if num_frames > 1 else IMAGE_FPS, "height": height, "width": width}
        rows = len(inputs["encoder_hidden_states"])
        inputs |= {name: torch.full((rows,), float(value), device=device) for name, value in sizes.items()}
        shape = (
            len(prompts), self.transformer.config.in_channels, self.vae.latent_frames(num_frames),
            height // self.vae_scale_factor, width // self.vae_scale_factor,
        )  # fmt: skip
        self.scheduler.set_shift(flow_shift(height, width, num_frames))
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        return self._video(
            shape, inputs, guidance_scale, generator, latents, output_type, return_dict, num_frames=num_frames
        )

    def _direction(self, out: Tensor) -> Tensor:
        """Flips the sign: the transformer's velocity points from noise to data, the scheduler's from data to noise."""
        return -out

    def _decoded(self, latents: Tensor, num_frames: int) -> Tensor:  # type: ignore[override]
        return self.vae.decode(latents, num_frames)


def flow_shift(height: int, width: int, num_frames: int) -> float:
    """The shift r of Open-Sora v1.2's schedule, t' = r t / (1 + (r - 1) t): more noise for larger videos.

    r = sqrt(height width / 512^2) sqrt(latent frames). The published code counts 5 latent frames for every full 17
    frames. Below 17 frames that would be zero, so the VAE's number is used: one for every four frames.
    """
    latent_frames = num_frames // 17 * 5 or math.ceil(num_frames / 4)
    return math.sqrt(height * width) / 512 * math.sqrt(latent_frames)
