"""Pipeline of class-conditional and unconditional Latte, with Stable Diffusion's VAE and a scheduler of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditq.errors import UsageError
from ditq.models.pipeline import Generators, VideoPipeline


class LatteClassPipeline(VideoPipeline):
    """Class to video with :class:`ditq.models.latte_class.Latte`.

    The published sampler is improved DDPM with 250 steps: ``DDPMScheduler(beta_schedule="linear",
    variance_type="learned_range", clip_sample=False)``. A scheduler without learned variance ignores the predicted
    variance.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self._assembled(vae=vae, transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        num_inference_steps: int = 250,
        guidance_scale: float = 7.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates a video for each label.

        An unconditional model uses only the number of labels, and ignores ``guidance_scale``.

        Raises:
            UsageError: a label is out of range.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        config = self.transformer.config
        inputs: dict[str, Tensor] = {}
        if config.num_classes is None:
            guidance_scale = 1.0
        else:
            wrong = [label for label in labels if not 0 <= label < config.num_classes]
            if wrong:
                raise UsageError(f"class_labels must be 0 to {config.num_classes - 1}, got {wrong[0]}.")
            no_class = [config.num_classes] * len(labels) if guidance_scale > 1 else []
            inputs["class_labels"] = torch.tensor(labels + no_class, device=self._execution_device)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        shape = (len(labels), config.in_channels, config.num_frames, config.input_size, config.input_size)
        return self._video(shape, inputs, guidance_scale, generator, latents, output_type, return_dict)
