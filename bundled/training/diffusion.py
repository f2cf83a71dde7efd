"""Trains the two diffusion transformers on the latents that ``vae.py`` wrote.

``python diffusion.py t2i --work DIR --minutes 60`` trains or resumes ``emoji-t2i`` (PixArt with a
small T5 encoder, jointly); ``class`` trains ``emoji-class`` (DiT, adaLN-zero), whose trunk starts
from the t2i weights where those exist. v-prediction on a cosine schedule; Muon for the hidden
matrices, AdamW for the rest; averaged weights are what gets published.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from artwork import CONCEPTS, caption, load
from common import Ema, Muon, Run, schedule
from diffusers import AutoencoderKL, DiTTransformer2DModel, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WIDTH, BLOCKS, HEAD = 256, 8, 64
TEXT_TOKENS = 10
TRUNK = {
    "num_attention_heads": WIDTH // HEAD,
    "attention_head_dim": HEAD,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": BLOCKS,
    "sample_size": 16,
    "patch_size": 4,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
}


def tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer over the captions that ends every text with ``</s>``, as T5's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789")
    t.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )


def text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=64,
            d_ff=512,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def phrasings(concept: str, style: str) -> list[str]:
    """The three ways one picture is described; the last names no style."""
    plain = caption(concept, style)
    words = plain.split(" emoji of ")[1]
    return [plain, f"{words} in {style} style", f"an emoji of {words}"]


class TextToImage(nn.Module):
    """PixArt and its T5 encoder as one trainable module."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = PixArtTransformer2DModel(
            **TRUNK, cross_attention_dim=WIDTH, caption_channels=WIDTH, use_additional_conditions=False
        )
        self.text_encoder = text_encoder(vocabulary)

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        mask = (tokens != 0).long()
        text = self.text_encoder(tokens, attention_mask=mask).last_hidden_state
        conditions = {"resolution": None, "aspect_ratio": None}
        return self.transformer(x, text, t, conditions, encoder_attention_mask=mask, return_dict=False)[0]


class ClassToImage(nn.Module):
    """DiT; the stock pipeline's label for "no class" is 1000, hence the table of 1001 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = DiTTransformer2DModel(**TRUNK, norm_type="ada_norm_zero", upcast_attention=False)
        for block in self.transformer.transformer_blocks:
            nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
            # Dropping labels is the training loop's business, the same for every block.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.transformer(x, timestep=t, class_labels=labels, return_dict=False)[0]

    @torch.no_grad()
    def start_from(self, source: dict[str, torch.Tensor]) -> None:
        """Takes the trunk of a trained PixArt; the class embedding then learns to steer it."""
        own = self.transformer.state_dict()
        new = {k: v for k, v in source.items() if k in own and own[k].shape == v.shape and "attn2" not in k}
        for i in range(BLOCKS):
            block = f"transformer_blocks.{i}.norm1"
            new[f"{block}.linear.weight"] = source["adaln_single.linear.weight"]
            new[f"{block}.linear.bias"] = (
                source["adaln_single.linear.bias"] + source[f"transformer_blocks.{i}.scale_shift_table"].flatten()
            )
            for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
                new[f"{block}.emb.timestep_embedder.{name}"] = source[f"adaln_single.emb.timestep_embedder.{name}"]
        new["proj_out_1.bias"] = source["scale_shift_table"].flatten()
        new["proj_out_2.weight"], new["proj_out_2.bias"] = source["proj_out.weight"], source["proj_out.bias"]
        self.transformer.load_state_dict(new, strict=False)
        print(f"started {len(new)} of {len(own)} tensors from emoji-t2i", flush=True)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    hidden, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and (
            "attn" in name or ".ff." in name or "DenseReluDense" in name or "SelfAttention" in name
        )
        (hidden if matrix and "relative" not in name else rest).append(p)
    return [
        Muon(hidden, lr=2 * lr),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...], guidance: float = 3.0
) -> torch.Tensor:
    """Latents of ``shape`` after twenty DPM-Solver++ steps from seed 0.

    ``predict(x, t)`` gets every row twice: first the rows without a condition, then those with theirs.
    """
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    scheduler.set_timesteps(20)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        u, c = predict(torch.cat([x, x]), t.expand(2 * len(x))).chunk(2)
        x = scheduler.step(u + guidance * (c - u), t, x).prev_sample
    return x


@torch.no_grad()
def sample_sheet(
    model: nn.Module, conditions: torch.Tensor, null: torch.Tensor, vae: AutoencoderKL, path: Path
) -> None:
    """A picture for each condition, eight to a row."""
    from PIL import Image

    both = torch.cat([null.expand_as(conditions), conditions])
    x = denoise(lambda x, t: model(x, t, both), (len(conditions), 4, 16, 16))
    images = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1).add(1).mul(127.5).byte()
    rows = len(images) // 8
    grid = images[: rows * 8].reshape(rows, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(rows * 64, 512, 3)
    Image.fromarray(grid.numpy()).save(path)


def join() -> int:
    """Rank of this process among those that share the work: the variables of ``torchrun`` say so, else it is alone."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
        return distributed.get_rank()
    return 0


def average_gradients(model: nn.Module) -> None:
    """The mean of every process's gradients, in every process."""
    if distributed.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / distributed.get_world_size(), gradients)


def fit(
    run: Run,
    args: argparse.Namespace,
    count: int,
    examples: Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, ...]],
    sheet: Callable[[Path], None],
    save_every: int = 250,
    sheet_every: int = 250,
) -> None:
    """Trains ``run``'s model by v-prediction until ``args.minutes`` or ``args.steps`` are over.

    ``examples(index, generator)`` gives the latents of those rows of the ``count`` there are, and the model's further
    arguments; ``sheet(path)`` draws with the averaged weights.
    """
    model, ema = run.modules["model"], run.ema
    base = [2 * args.lr, args.lr]  # of ``optimizers``; a resumed optimizer holds the rate it stopped at
    rank = join()
    generator = torch.Generator().manual_seed(args.seed + run.step + 1_000_000 * rank)
    alphas = DPMSolverMultistepScheduler(**SCHEDULER).alphas_cumprod
    forward = torch.compile(model, dynamic=False) if args.compile else model
    order = torch.empty(0, dtype=torch.long)
    begin, average = time.time(), 0.0
    while time.time() - begin < 60 * args.minutes and run.step < args.steps:
        for optimizer, lr in zip(run.optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * schedule(run.step, args.steps)
        while len(order) < args.batch:  # epochs without replacement: every example equally often
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        index, order = order[: args.batch], order[args.batch :]
        z, *conditions = examples(index, generator)
        # Stratified times: one from each of `batch` equal slices, which lowers the loss's variance.
        u = (
            torch.randperm(args.batch, generator=generator) + torch.rand(args.batch, generator=generator)
        ) / args.batch
        u = args.shift * u / (1 + (args.shift - 1) * u)
        t = (u * 1000).long().clamp(0, 999)
        noise = torch.randn(z.shape, generator=generator)
        broadcast = (-1,) + (1,) * (z.ndim - 1)
        a, s = alphas[t].sqrt().view(broadcast), (1 - alphas[t]).sqrt().view(broadcast)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), sdpa_kernel(SDPBackend.MATH):
            predicted = forward(a * z + s * noise, t, *conditions)
        loss = F.mse_loss(predicted.float(), a * noise - s * z)
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):  # of Muon's products
            for optimizer in run.optimizers:
                optimizer.step()
        run.step += 1
        ema.update(run.step)
        average = loss.item() if average == 0 else 0.98 * average + 0.02 * loss.item()
        if rank > 0:
            continue
        if run.step % 25 == 0:
            run.record(loss=average)
        if run.step % save_every == 0 or run.step == args.steps:
            run.save()
        if run.step % sheet_every == 0 or run.step == args.steps:
            trained = {k: v.clone() for k, v in model.state_dict().items()}
            ema.copy_to({"model": model})
            model.eval()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                sheet(run.folder / f"sheet-{run.step:05d}.png")
            model.train().load_state_dict(trained)
    if rank == 0:
        run.save()


def arguments(parser: argparse.ArgumentParser, steps: int, batch: int, shift: float = 1.0) -> argparse.Namespace:
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=steps, help="length of the learning-rate schedule")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="products in bf16: faster on a CPU that has it")
    parser.add_argument("--shift", type=float, default=shift, help="more than 1: more of the noisy times")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["t2i", "class"])
    args = arguments(parser, steps=4000, batch=128)

    art = load(args.work)
    taught = art["taught"]
    with np.load(args.work / "latents.npz") as stored:
        mean, std = (torch.from_numpy(stored[k][taught]) for k in ("mean", "std"))
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    names = list(zip(art["concept"][taught], art["style"][taught], strict=True))
    torch.manual_seed(args.seed)

    if args.model == "t2i":
        texts = [phrasings(*n) for n in names]
        tok = tokenizer([text for three in texts for text in three])
        tok.save_pretrained(args.work / "tokenizer")

        def encode(batch: list[str]) -> torch.Tensor:
            padded = tok(batch, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
            return padded.input_ids

        conditions = torch.stack([encode(three) for three in texts])  # [N, 3, L]
        null = encode([""])[0]
        model: nn.Module = TextToImage(len(tok))
    else:
        label = {concept: i for i, concept in enumerate(sorted(CONCEPTS))}
        conditions = torch.tensor([[label[c]] for c, _ in names])  # [N, 1]
        null = torch.tensor(1000)
        model = ClassToImage()

    ema = Ema({"model": model}, 0.998)
    run = Run(args.work / args.model, {"model": model}, optimizers(model, args.lr), ema)
    warm_start = args.work / "t2i" / "checkpoint.pt"
    if args.model == "class" and run.step == 0 and warm_start.exists():
        shadow = torch.load(warm_start, weights_only=True)["ema"]
        prefix = "model.transformer."
        model.start_from({k[len(prefix) :]: v for k, v in shadow.items() if k.startswith(prefix)})
        ema.shadow = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(names)} pictures", flush=True)

    def examples(index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        z = (mean[index] + std[index] * torch.randn(std[index].shape, generator=generator)) * vae.config.scaling_factor
        which = torch.randint(conditions.shape[1], (len(index),), generator=generator)
        cond = conditions[index, which].clone()
        cond[torch.rand(len(index), generator=generator) < 0.1] = null
        return z, cond

    picks = np.linspace(0, len(names) - 1, 32).astype(int)
    fit(run, args, len(names), examples, lambda path: sample_sheet(model, conditions[picks, 0], null, vae, path))


if __name__ == "__main__":
    main()
