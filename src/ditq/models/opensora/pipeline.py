"""Open-Sora v1.0 and v1.2 text to video, with T5 and samplers of diffusers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ditq.models.pipeline import Generators, VideoPipeline

PICTURE_RATE = 120  # frames a second that v1.2 is told for a single image


class OpenSoraPipeline(VideoPipeline):
    """Text to video with :class:`ditq.models.opensora.STDiT`, and the VAE of Stable Diffusion.

    The published sampler is that of improved DDPM in 100 steps: ``DDPMScheduler(beta_schedule="linear",
    variance_type="learned_range", clip_sample=False)``. A scheduler without learned variance takes the noise only.
    Prompts are lower-cased; the published code also removes web addresses and markup.
    """

    GUIDED = 3  # as published

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self._assembled(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def encode_prompt(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        """T5's output [n, length, channels] and mask [n, length] of prompts."""
        found = self.tokenizer(
            [p.lower().strip() for p in prompt], padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.transformer.config.model_max_length,
        ).to(self._execution_device)  # fmt: skip
        text = self.text_encoder(found.input_ids, attention_mask=found.attention_mask)[0]
        return text.to(self.transformer.dtype), found.attention_mask

    def _text(self, prompt: list[str], guided: bool) -> dict[str, Tensor]:
        """The transformer's inputs for prompts; under guidance also for none, a text as long as the prompt's."""
        text, mask = self.encode_prompt(prompt)
        if guided:
            nothing = self.transformer.y_embedder.y_embedding.to(text).expand_as(text)
            text, mask = torch.cat([text, nothing]), torch.cat([mask, mask])
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
        """Videos of the size that the transformer was trained on, unless ``height``, ``width``, ``num_frames`` say."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        trained: tuple[int, ...] = tuple(self.transformer.config.input_size)
        sides = [
            n if given is None else given // self.vae_scale_factor
            for given, n in zip((height, width), trained[1:], strict=True)
        ]
        shape = (len(prompts), self.transformer.config.in_channels, num_frames or trained[0], *sides)
        inputs = self._text(prompts, guidance_scale > 1)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        return self._video(shape, inputs, guidance_scale, generator, latents, output_type, return_dict)


class OpenSora12Pipeline(OpenSoraPipeline):
    """Text to video with STDiT3 and OpenSoraVAE of ``ditq.models.opensora``.

    The published sampler is Euler's, in 30 steps, along straight lines from noise to data (rectified flow):
    ``FlowMatchEulerDiscreteScheduler()``, whose shift is set for the size of each video, see :func:`flow_shift`.
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
        """Videos of ``num_frames`` frames; the VAE takes them 17 at a time, and a rest of any length.

        Args:
            fps: frames a second, of which the transformer is told.
            aesthetic_score: said at the end of prompts that do not name one, as in training; None: not said.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if aesthetic_score is not None:
            prompts = [
                p if "aesthetic score:" in p else f"{p} aesthetic score: {aesthetic_score:.1f}." for p in prompts
            ]
        device = self._execution_device
        inputs = self._text(prompts, guidance_scale > 1)
        told = {"fps": fps if num_frames > 1 else PICTURE_RATE, "height": height, "width": width}
        rows = len(inputs["encoder_hidden_states"])
        inputs |= {name: torch.full((rows,), float(value), device=device) for name, value in told.items()}
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
        """The transformer points from noise to data, the scheduler from data to noise."""
        return -out

    def _decoded(self, latents: Tensor, num_frames: int) -> Tensor:  # type: ignore[override]
        return self.vae.decode(latents, num_frames)


def flow_shift(height: int, width: int, num_frames: int) -> float:
    """How much longer Open-Sora v1.2 stays at the noisy end: r in t' = r t / (1 + (r - 1) t).

    r = sqrt(height width / 512^2) sqrt(latent frames), where the published code counts 5 latent frames for every full
    17. Below 17 that would be none and no schedule; there it is what the VAE makes of them, one of four.
    """
    latent_frames = num_frames // 17 * 5 or math.ceil(num_frames / 4)
    return math.sqrt(height * width) / 512 * math.sqrt(latent_frames)
