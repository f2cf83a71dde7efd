"""Trains the ``AutoencoderKL`` both pipelines use: 64 x 64 x 3 pictures to 16 x 16 x 4 latents.

``python vae.py --work DIR --minutes 12`` trains or resumes; ``--decoder-only`` goes on with the
decoder alone, so that diffusion models trained on the old latents stay valid. Writes
``DIR/vae`` (diffusers folder) and ``DIR/latents.npz`` (means and deviations of every picture).

``--clips`` goes on from the bundled ``emoji-t2i``'s with the frames that ``clips.py`` draws, which show objects off
the centre and coloured backgrounds, and writes ``DIR/video-vae``: near enough to the old latents that the weights of
``emoji-t2i`` are a start for ``emoji-video``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import clips
import numpy as np
import torch
from artwork import load
from common import EMOJI_T2I, Ema, Run
from diffusers import AutoencoderKL
from torch.nn import functional as F  # noqa: N812

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_terms(vae: AutoencoderKL, x: torch.Tensor, train_encoder: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 on pixels and on their differences (sharp outlines), plus a light KL."""
    with torch.set_grad_enabled(train_encoder):
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
    y = vae.decode(z).sample.float()
    pixel = (y - x).abs().mean() + 0.2 * F.mse_loss(y, x)
    gradient = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
    loss = pixel + 0.5 * gradient
    if train_encoder:
        loss = loss + 2e-4 * posterior.kl().float().mean() / x[0].numel() * 48
    return loss, y


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor) -> None:
    """Makes every latent channel zero-mean and unit-variance, exactly, inside the two 1 x 1 convolutions.

    ``mean`` [N, 4, 16, 16] are latents of the old encoder. Stock pipelines know one scaling factor and no
    shift, and diffusion wants channels of equal power.
    """
    mu, sigma = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    n = len(mu)
    before.weight[:n] /= sigma[:, None, None, None]
    before.bias[:n].sub_(mu).div_(sigma)
    before.bias[n:] -= 2 * sigma.log()
    after.bias += after.weight[:, :, 0, 0] @ mu
    after.weight *= sigma[None, :, None, None]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = [vae.encode(p.float().div(127.5).sub(1)).latent_dist for p in pictures.split(64)]
    return torch.cat([c.mean for c in chunks]), torch.cat([c.std for c in chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--clips", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.clips:
        pictures = clips.frames(args.work, count=1024, seed=args.seed + 1)
        taught = torch.ones(len(pictures), dtype=torch.bool)
    else:
        art = load(args.work)
        pictures = torch.from_numpy(art["images"]).permute(0, 3, 1, 2)
        taught = torch.from_numpy(art["taught"])
    # Pictures the diffusion models learn are seen three times as often as the others.
    weights = torch.where(taught, 3.0, 1.0)

    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(pictures)} pictures", flush=True)
    parts = [vae.decoder, vae.post_quant_conv] if args.decoder_only else [vae]
    optimizer = torch.optim.AdamW(
        [p for m in parts for p in m.parameters()], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    ema = Ema({"vae": vae}, 0.998)
    folder = "vae-decoder" if args.decoder_only else "video-vae-run" if args.clips else "vae-run"
    run = Run(args.work / folder, {"vae": vae}, [optimizer], ema)
    if (args.decoder_only or args.clips) and run.step == 0:
        start = EMOJI_T2I / "vae" if args.clips else args.work / "vae"
        vae.load_state_dict(AutoencoderKL.from_pretrained(start).state_dict())
        ema.shadow = {f"vae.{n}": p.detach().clone().float() for n, p in vae.named_parameters()}

    begin, average = time.time(), 0.0
    while (elapsed := (time.time() - begin) / 60) < args.minutes:
        warm = min(1.0, (run.step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * max(0.02, min(1.0, 2.2 * (1 - elapsed / args.minutes)))
        x = pictures[torch.multinomial(weights, args.batch)].float().div(127.5).sub(1)
        x = x.to(memory_format=torch.channels_last)
        # float32: convolutions this narrow run slower in bf16 on a CPU without bf16 instructions.
        loss, y = loss_terms(vae, x, not args.decoder_only)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        ema.update(run.step)
        mse = F.mse_loss(y.detach().clamp(-1, 1), x).item()
        average = mse if average == 0 else 0.98 * average + 0.02 * mse
        if run.step % 50 == 0:
            run.record(loss=loss.item(), psnr=float(10 * np.log10(4 / average)))
        if run.step % 400 == 0:
            run.save()
    run.save()

    ema.copy_to({"vae": vae})
    if args.clips:
        vae.eval().register_to_config(scaling_factor=1.0)
        vae.save_pretrained(args.work / "video-vae")
    elif args.decoder_only:
        frozen = AutoencoderKL.from_pretrained(args.work / "vae")
        vae.encoder, vae.quant_conv = frozen.encoder, frozen.quant_conv
        vae.register_to_config(scaling_factor=frozen.config.scaling_factor)
        vae.save_pretrained(args.work / "vae")
    else:
        vae.eval()
        standardise(vae, encode_all(vae, pictures)[0][taught])
        mean, std = encode_all(vae, pictures)
        vae.register_to_config(scaling_factor=1.0)
        vae.save_pretrained(args.work / "vae")
        np.savez(args.work / "latents.npz", mean=mean.numpy(), std=std.numpy())
        print(
            "latent channel means",
            mean[taught].mean((0, 2, 3)).tolist(),
            "stds",
            mean[taught].std((0, 2, 3)).tolist(),
            "noise",
            std.mean().item(),
        )
    with torch.no_grad():
        x = pictures[taught][:: max(1, int(taught.sum()) // 64)][:64].float().div(127.5).sub(1)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        print(f"PSNR of 64 taught pictures: {10 * np.log10(4 / F.mse_loss(y, x).item()):.2f} dB", flush=True)
        from PIL import Image

        rows = torch.cat([x[:16], y[:16]]).reshape(2, 16, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(128, 1024, 3)
        sheet = "video-vae-sheet.png" if args.clips else "vae-sheet.png"
        Image.fromarray(rows.add(1).mul(127.5).byte().numpy()).save(args.work / sheet)


if __name__ == "__main__":
    main()
