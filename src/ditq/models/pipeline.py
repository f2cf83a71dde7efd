"""What the pipelines of our own video transformers share: guided denoising by a scheduler of diffusers, and frames."""

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

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class VideoOutput(BaseOutput):
    """``frames``: lists of images, or what ``output_type`` asks for."""

    frames: Any


class VideoPipeline(DiffusionPipeline):
    """Guidance runs in one batch, the conditional half first; decoding takes each frame by itself.

    ``GUIDED`` is how many channels of the transformer's output guidance acts on. The others (the variance, at least)
    are the conditional half's.
    """

    GUIDED = 4
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def _assembled(self, **parts: Any) -> None:
        """The last line of a constructor: its modules, and what follows from them."""
        self.register_modules(**parts)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    def _video(
        self,
        shape: tuple[int, ...],
        inputs: dict[str, Tensor],
        guidance_scale: float,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        **decoding: Any,
    ) -> Any:
        """From noise, or ``latents`` in its place, to what a pipeline returns.

        Args:
            shape: of the latents, [n, C, T, H, W].
            inputs: of the transformer beside latents and timestep: [2 n, ...] under guidance, else [n, ...].
            decoding: arguments of :meth:`_decoded`.
        """
        scheduler, device = self.scheduler, self._execution_device
        guided = guidance_scale > 1
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
            latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
        learned = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for t in scheduler.timesteps:
                both = torch.cat([latents, latents]) if guided else latents
                out = self.transformer(
                    hidden_states=scaled(both, t), timestep=t.expand(len(both)), **inputs, return_dict=False
                )[0]
                if guided:
                    out, other = out.chunk(2)
                    least = other[:, : self.GUIDED]
                    first = least + guidance_scale * (out[:, : self.GUIDED] - least)
                    out = torch.cat([first, out[:, self.GUIDED :]], dim=1)
                if not learned:
                    out = out[:, : shape[1]]
                latents = scheduler.step(self._direction(out), t, latents, **options, return_dict=False)[0]
                bar.update()
        frames: Any = latents
        if output_type != "latent":
            video = self._decoded(latents, **decoding)
            frames = self.video_processor.postprocess_video(video.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames=frames) if return_dict else (frames,)

    def _direction(self, out: Tensor) -> Tensor:
        """The transformer's output as the scheduler counts it."""
        return out

    def _decoded(self, latents: Tensor) -> Tensor:
        """Latents [n, C, T, H, W] to a video [n, 3, T, pixels, pixels]."""
        frames = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        pictures = torch.cat([self.vae.decode(frame, return_dict=False)[0] for frame in frames.split(1)])
        return pictures.unflatten(0, (len(latents), -1)).transpose(1, 2)
