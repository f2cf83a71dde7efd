"""The base class of ditq's video pipelines: guided denoising with a scheduler of diffusers, and decoding of frames."""

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
    """``frames``: lists of images, or the type set by ``output_type``."""

    frames: Any


class VideoPipeline(DiffusionPipeline):
    """Denoising and decoding of videos.

    Guidance runs in one batch, with the conditional half first. Frames are decoded one by one.

    Attributes:
        GUIDED: the number of channels of the transformer's output that guidance acts on. The other channels (such as
            the variance) are taken from the conditional half.
    """

    GUIDED = 4
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def _assembled(self, **parts: Any) -> None:
        """Registers the modules and sets the attributes that depend on them; the last call of a constructor."""
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
        """Denoises and decodes videos.

        Args:
            shape: of the latents, [n, C, T, H, W].
            inputs: of the transformer, besides latents and timestep: [2 n, ...] with guidance, else [n, ...].
            guidance_scale: above 1 turns guidance on.
            generator: of the initial noise and of the scheduler.
            latents: the initial noise; None generates it.
            output_type: as in diffusers; ``latent`` returns latents.
            return_dict: False returns a tuple.
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
                batch = torch.cat([latents, latents]) if guided else latents
                out = self.transformer(
                    hidden_states=scaled(batch, t), timestep=t.expand(len(batch)), **inputs, return_dict=False
                )[0]
                if guided:
                    out, unconditional = out.chunk(2)
                    base = unconditional[:, : self.GUIDED]
                    prediction = base + guidance_scale * (out[:, : self.GUIDED] - base)
                    out = torch.cat([prediction, out[:, self.GUIDED :]], dim=1)
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
        """The transformer's output in the sign convention of the scheduler."""
        return out

    def _decoded(self, latents: Tensor) -> Tensor:
        """Latents [n, C, T, H, W] to a video [n, 3, T, pixels, pixels]."""
        frames = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        images = torch.cat([self.vae.decode(frame, return_dict=False)[0] for frame in frames.split(1)])
        return images.unflatten(0, (len(latents), -1)).transpose(1, 2)
