"""Trains ``emoji-video``, a text-to-video Latte, on the clips that ``clips.py`` wrote.

``python video.py --work DIR --minutes 60`` trains or resumes; ``--steps`` sets the length of the learning-rate
schedule, ``--bf16`` halves the time on a CPU that has such products, and ``torchrun --nproc-per-node 2 video.py
--batch 12 ...`` shares the work. The spatial blocks, the text encoder and everything around them start from the
bundled ``emoji-t2i``; the temporal blocks start as copies of the spatial ones whose outputs are zero, so the model
begins as one that draws each frame for itself. v-prediction, as in ``diffusion.py``, with noisy times more often:
eight frames give an object away at noise that would hide one, so only there the text decides how it moves.

The stock ``LattePipeline`` gives the transformer no attention mask. It cuts the text of a single prompt to its
tokens, and the empty one to as many; for a list of prompts it pads both to 120 tokens, the prompts with zeros. Half
of the batches are trained on either. Padding of one text is equal everywhere, so one token whose attention score
is raised by the logarithm of their number stands for all of it, exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from clips import FRAMES, captions
from common import EMOJI_T2I, Ema, Run
from diffusers import AutoencoderKL, DiffusionPipeline, LatteTransformer3DModel
from diffusion import TRUNK, WIDTH, arguments, denoise, fit, optimizers, text_encoder, tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

TEXT_TOKENS = 12  # the longest caption, its end, and at least one of padding
PIPELINE_TOKENS = 120  # LattePipeline's for a list of prompts
BLOCKS = (0, 1, 2, 4, 6, 7)  # of emoji-t2i's eight, so that a step costs a quarter less
CONFIG = {
    # The stock pipeline drops the second half of the output channels, a variance in the published models.
    **TRUNK, "num_layers": len(BLOCKS), "out_channels": 8, "norm_type": "ada_norm_single", "video_length": FRAMES,
    "caption_channels": WIDTH, "cross_attention_dim": WIDTH,
}  # fmt: skip


def padding_bias(shown: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Attention bias [B, 1, L] of ``shown`` real tokens [B] whose last column stands for the rest of ``total`` [B]."""
    bias = torch.full((len(shown), TEXT_TOKENS), -1e4)
    bias.masked_fill_(torch.arange(TEXT_TOKENS) < shown[:, None], 0.0)
    more = total - shown
    bias[:, -1] = torch.where(more > 0, more.clamp(min=1).log(), bias[:, -1])
    return bias[:, None]


class TextToVideo(nn.Module):
    """Latte and its T5 encoder as one trainable module."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = LatteTransformer3DModel(**CONFIG)
        self.text_encoder = text_encoder(vocabulary)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor, total: torch.Tensor
    ) -> torch.Tensor:
        """Prediction for ``x`` [B, F, C, H, W].

        ``tokens`` [B, TEXT_TOKENS] end with padding; ``length`` [B] are those of the captions, also where the
        tokens are of the empty text instead; ``total`` [B] is what the pipeline pads to.
        """
        mask = tokens != 0
        shown = mask.sum(1)
        text = self.text_encoder(tokens, attention_mask=mask.long()).last_hidden_state
        # The pipeline puts zeros in the padding of a prompt, not in that of the empty one.
        text = torch.where((shown == length)[:, None, None], text * mask[..., None], text)
        bias = padding_bias(shown, total).repeat_interleave(x.shape[1], 0)
        out = self.transformer(x.transpose(1, 2), t, text, bias, return_dict=False)[0]
        return out[:, : x.shape[2]].transpose(1, 2)

    @torch.no_grad()
    def start_from(
        self, source: dict[str, torch.Tensor], old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
    ) -> None:
        """Takes the weights of ``TextToImage`` wherever a tensor means the same."""
        own = self.state_dict()
        taken = {k: v for k, v in source.items() if k in own and own[k].shape == v.shape and "_blocks." not in k}
        for to, block in enumerate(BLOCKS):
            prefix = f"transformer.transformer_blocks.{block}."
            for name, value in source.items():
                if name.startswith(prefix):
                    rest = name[len(prefix) :]
                    taken[f"transformer.transformer_blocks.{to}.{rest}"] = value
                    temporal = f"transformer.temporal_transformer_blocks.{to}.{rest}"
                    if temporal in own:
                        last = rest.startswith(("attn1.to_out.0", "ff.net.2"))
                        taken[temporal] = torch.zeros_like(value) if last else value
        for name in ("weight", "bias"):  # rows are [patch, patch, channel]
            value = source[f"transformer.proj_out.{name}"]
            patches = value.reshape(16, 4, *value.shape[1:])
            key = f"transformer.proj_out.{name}"
            taken[key] = torch.cat([patches, torch.zeros_like(patches)], 1).reshape(own[key].shape)
        # A word that was several pieces starts as their mean.
        rows = source["text_encoder.shared.weight"]
        words = own["text_encoder.shared.weight"].clone()
        for word, row in new.get_vocab().items():
            pieces = [old.convert_tokens_to_ids(word)] if word in old.get_vocab() else old(word).input_ids[:-1]
            words[row] = rows[pieces].mean(0)
        taken["text_encoder.shared.weight"] = taken["text_encoder.encoder.embed_tokens.weight"] = words
        missing = [k for k in own if k not in taken and not k.endswith("pos_embed")]
        self.load_state_dict({k: v for k, v in taken.items() if k in own}, strict=False)
        print(f"started all but {missing} of {len(own)} tensors from emoji-t2i", flush=True)


def encode(tok: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    tokens = tok(texts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    if tokens.shape[1] != TEXT_TOKENS or (tokens[:, -1] != 0).any():
        raise ValueError(f"a text has no room for padding in {TEXT_TOKENS} tokens")
    return tokens


def image_model() -> tuple[dict[str, torch.Tensor], PreTrainedTokenizerFast]:
    """The weights of the bundled ``emoji-t2i``, named as in ``TextToImage``, and its tokenizer."""
    pipe = DiffusionPipeline.from_pretrained(EMOJI_T2I, vae=None)
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    weights = {f"{part}.{k}": v.float() for part, module in parts.items() for k, v in module.state_dict().items()}
    return weights, pipe.tokenizer


def evaluation(count: int = 10) -> list[str]:
    """The first prompts of the bundled list, which training holds out."""
    listed = Path(__file__).parents[1] / "src" / "ditq_bundled" / "prompts" / "emoji-video-evaluation.txt"
    return listed.read_text(encoding="utf-8").splitlines()[:count]


@torch.no_grad()
def sample(model: TextToVideo, tok: PreTrainedTokenizerFast, texts: list[str], guidance: float = 4.0) -> torch.Tensor:
    """Latents [B, F, C, H, W] of clips that were asked for one by one."""
    tokens = encode(tok, texts)
    length = (tokens != 0).sum(1).repeat(2)
    both = torch.cat([encode(tok, [""]).expand_as(tokens), tokens])
    return denoise(lambda x, t: model(x, t, both, length, length), (len(texts), FRAMES, 4, 16, 16), guidance)


@torch.no_grad()
def sheet(model: TextToVideo, tok: PreTrainedTokenizerFast, texts: list[str], vae: AutoencoderKL, path: Path) -> None:
    """A clip a row under its text, frame by frame."""
    from PIL import Image, ImageDraw

    z = sample(model, tok, texts) / vae.config.scaling_factor
    page = Image.new("RGB", (FRAMES * 66, len(texts) * 78), "white")
    for row, text in enumerate(texts):
        ImageDraw.Draw(page).text((2, row * 78), text, fill="black")
        for i, frame in enumerate(vae.decode(z[row]).sample.clamp(-1, 1).add(1).mul(127.5).byte()):
            page.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), (i * 66, row * 78 + 13))
    page.save(path)


def main() -> None:
    args = arguments(argparse.ArgumentParser(description=__doc__), steps=1000, batch=24, shift=2.5)
    with np.load(args.work / "clips.npz") as stored:
        latents, texts = torch.from_numpy(stored["latents"]), stored["caption"].tolist()
    vae = AutoencoderKL.from_pretrained(args.work / "video-vae").eval()
    tok = tokenizer(captions())
    tok.save_pretrained(args.work / "video-tokenizer")
    tokens, null = encode(tok, texts), encode(tok, [""])[0]
    lengths = (tokens != 0).sum(1)

    torch.manual_seed(args.seed)
    model = TextToVideo(len(tok))
    ema = Ema({"model": model}, 0.997)
    run = Run(args.work / "video", {"model": model}, optimizers(model, args.lr), ema)
    if run.step == 0:
        model.start_from(*image_model(), tok)
        ema.shadow = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(latents)} clips", flush=True)

    def examples(index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        dropped = torch.rand(len(index), generator=generator) < 0.1
        shown = torch.where(dropped[:, None], null, tokens[index])
        padded = torch.rand((), generator=generator) < 0.5
        total = torch.full_like(index, PIPELINE_TOKENS) if padded else lengths[index]
        return latents[index].float(), shown, lengths[index], total

    fit(
        run, args, len(latents), examples, lambda path: sheet(model, tok, evaluation(), vae, path),
        save_every=25, sheet_every=150,
    )  # fmt: skip


if __name__ == "__main__":
    main()
