"""The base class of ditq's models, which refuses incomplete checkpoints."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_utils import ModelMixin as _ModelMixin

from ditq.errors import CheckpointError


class ModelMixin(_ModelMixin):
    """diffusers' ``ModelMixin``, except that a missing tensor is an error; diffusers fills it with random numbers.

    It has the name of its base, because diffusers looks for this name in the module that defines a model. That module
    must import it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Like diffusers' method, but reads safetensors only.

        Raises:
            CheckpointError: a tensor is missing or unexpected (the message names it), or the files are pickles.
        """
        return_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise CheckpointError(
                f"{error} ditq reads safetensors and no pickles (.bin, .pth), because pickles can run code. Convert a "
                "file that you trust: save_file(torch.load(path, weights_only=True), path) of safetensors.torch."
            ) from error
        missing = set(info["missing_keys"])
        if kwargs.get("device_map") is None:  # with a device map, tensors may be on a disk
            # With several files diffusers trusts the index, and leaves tensors that no file has on the meta device.
            missing |= {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        checkpoint = f"The checkpoint {pretrained_model_name_or_path}"
        for tensor_names, problem in ((missing, "lacks"), (info["unexpected_keys"], "has the unexpected")):
            if names := sorted(tensor_names):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CheckpointError(f"{checkpoint} {problem} tensor {names[0]!r}{more} ({cls.__name__}).")
        return (model, info) if return_info else model
