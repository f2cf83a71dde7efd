"""The base class of our own models: one that is loaded is complete."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_utils import ModelMixin as _ModelMixin

from ditq.errors import CheckpointError


class ModelMixin(_ModelMixin):
    """diffusers' class of this name, which fills a tensor that the checkpoint lacks with random numbers, and warns.

    Named like its base because diffusers, to load a class, looks for this name in the module that defines it: that
    module has to import it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own, from safetensors only.

        Raises:
            CheckpointError: a tensor is missing, or is none of the model's; it is named. Or the files are pickles.
        """
        wanted = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise CheckpointError(
                f"{error} ditq reads safetensors, and no pickles (.bin, .pth), which can run code. Convert what you "
                "trust: save_file(torch.load(path, weights_only=True), path) of safetensors.torch."
            ) from error
        missing = set(info["missing_keys"])
        if kwargs.get("device_map") is None:  # with one, tensors may lie on a disk
            # Of several files diffusers believes the index, and leaves what is not in them without memory.
            missing |= {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        where = f"The checkpoint {pretrained_model_name_or_path}"
        for found, complaint in ((missing, "lacks"), (info["unexpected_keys"], "has, beside the model's own,")):
            if names := sorted(found):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CheckpointError(f"{where} {complaint} tensor {names[0]!r}{more} ({cls.__name__}).")
        return (model, info) if wanted else model
