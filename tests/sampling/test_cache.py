"""The cache never samples twice, and never returns a stale or damaged image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, PROMPTS, tiny_dit, tiny_pixart
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import ditq
from ditq import architectures
from ditq.errors import UsageError
from ditq.sampling import PictureCache, Samples, Sampling, fingerprint, sample
from ditq.sampling.cache import Sample

DIT = architectures.load("dit")
OPTIONS: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "batch_size": 2}


def draw(pipe: Any, cache: PictureCache, conditions: list[str] = CLASSES, **changes: Any) -> tuple[Samples, int]:
    """Samples, and the number of transformer calls."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = pipe.transformer.register_forward_pre_hook(count)
    try:
        return sample(pipe, DIT, conditions, Sampling(**{**OPTIONS, **changes}), cache=cache), calls
    finally:
        handle.remove()


@pytest.fixture
def cache(tmp_path: Path) -> PictureCache:
    return PictureCache(tmp_path / "pictures")


def equal(a: Samples, b: Samples) -> bool:
    same_images = all(x.tobytes() == y.tobytes() for x, y in zip(a.images, b.images, strict=True))
    return same_images and torch.equal(a.trajectory, b.trajectory) and a.timesteps == b.timesteps


def test_second_run_samples_nothing_and_returns_the_same(cache: PictureCache) -> None:
    first, calls = draw(tiny_dit(), cache)
    assert calls == 2 * 2
    second, calls = draw(tiny_dit(), cache)  # another pipeline object of the same weights
    assert calls == 0
    assert equal(first, second)
    assert second.seconds == first.seconds
    assert equal(first, sample(tiny_dit(), DIT, CLASSES, Sampling(**OPTIONS)))


@pytest.mark.parametrize("changes", [{"steps": 3}, {"guidance_scale": 2.0}, {"seed": 9}], ids=str)
def test_another_sampler_samples_again(changes: dict[str, Any], cache: PictureCache) -> None:
    draw(tiny_dit(), cache)
    assert draw(tiny_dit(), cache, **changes)[1] > 0


def test_only_missing_images_are_sampled(cache: PictureCache) -> None:
    draw(tiny_dit(), cache, CLASSES[:2])
    samples, calls = draw(tiny_dit(), cache)
    assert calls == 2  # one batch of two steps
    assert equal(samples, sample(tiny_dit(), DIT, CLASSES, Sampling(**OPTIONS)))


def test_progress_counts_cached_images(cache: PictureCache) -> None:
    draw(tiny_dit(), cache, CLASSES[:2])
    seen: list[int] = []
    sample(tiny_dit(), DIT, CLASSES, Sampling(**OPTIONS), cache=cache, on_batch=seen.append)
    assert seen == [2, 2]


def test_interrupted_run_resumes(cache: PictureCache) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(tiny_dit(), DIT, CLASSES, Sampling(**OPTIONS), cache=cache, on_batch=stop)
    assert draw(tiny_dit(), cache)[1] == 2


def test_damaged_files_are_sampled_again(cache: PictureCache) -> None:
    first, _ = draw(tiny_dit(), cache)
    files = sorted(cache.folder.rglob("*.safetensors"))
    assert len(files) == len(CLASSES)
    files[0].write_bytes(files[0].read_bytes()[:50])
    flipped = bytearray(files[1].read_bytes())
    flipped[-1] ^= 1
    files[1].write_bytes(bytes(flipped))
    files[2].write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged .* the image is generated again"):
        second, calls = draw(tiny_dit(), cache)
    assert calls == 2 * 2  # three images in two batches
    assert equal(first, second)  # whole batches are generated again


@pytest.mark.parametrize(
    "change",
    [
        lambda t, info: t.update(frames=t["frames"].transpose(1, 2).contiguous()),
        lambda t, info: t.update(frames=t["frames"].view(torch.int8)),
        lambda t, info: t.update(trajectory=t["trajectory"].view(torch.int32)),
        lambda t, info: t.update(trajectory=t["trajectory"].flatten(1)),
        lambda t, info: t.update(frames=t["frames"].flip(0).clone()),
        lambda t, info: info.update(video=False),
        lambda t, info: info.update(timesteps=[3.0]),
        lambda t, info: info.update(seconds=0.0),
        lambda t, info: info.pop("checksum"),
        lambda t, info: info.update(checksum=None),
    ],
)
def test_any_changed_part_is_damage(change: Any, cache: PictureCache) -> None:
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3)).astype(np.uint8)) for i in range(2)]
    cache.put("ab12", Sample(frames, torch.randn(4, 2, 3), [9.0, 5.0, 2.0, 1.0], 0.5))
    path = cache._path("ab12")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(file.metadata()["sample"])
    change(tensors, info)
    save_file(tensors, path, {"sample": json.dumps(info)})
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("ab12") is None


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 5000, '{"checksum": 1}'], ids=str)
def test_odd_metadata_is_damage(text: str, cache: PictureCache) -> None:
    cache._path("ab12").parent.mkdir(parents=True)
    tensors = {"frames": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "trajectory": torch.zeros(1, 1)}
    save_file(tensors, cache._path("ab12"), {"sample": text})
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("ab12") is None


def test_renamed_file_is_damage(cache: PictureCache) -> None:
    cache.put("ab12", Sample(Image.new("RGB", (8, 8)), torch.zeros(1, 1), [1.0], 0.1))
    cache._path("ab12").rename(cache._path("ab99"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("ab99") is None


def test_other_batches_and_threads_have_other_keys(cache: PictureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tiny_dit(), cache)
    assert draw(tiny_dit(), cache, batch_size=4)[1] == 2
    assert draw(tiny_dit(), cache, CLASSES[:3])[1] == 2  # the third is alone in its batch now
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert draw(tiny_dit(), cache)[1] == 2 * 2


@pytest.mark.parametrize("text", ["abc", "-1", "1e9", "9" * 30])
def test_size_limit_must_be_a_number(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITQ_CACHE_BYTES", text)
    with pytest.raises(UsageError, match="DITQ_CACHE_BYTES must be a whole number of bytes"):
        PictureCache(tmp_path)


def test_cache_that_cannot_be_written_does_not_stop_drawing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="image cache .* cannot be written .*--no-cache") as said:
        samples, _ = draw(tiny_dit(), PictureCache(tmp_path / "file" / "pictures"))
    assert len([x for x in said if "image cache" in str(x.message)]) == 1
    assert len(samples.images) == len(CLASSES)


def test_video_and_latents_come_back_exactly(cache: PictureCache) -> None:
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 8, 3)).astype(np.uint8)) for i in range(3)]
    cache.put("ab12", Sample(frames, torch.randn(4, 2, 3), [9.0, 5.0, 2.0, 1.0], 0.5))
    cached = cache.get("ab12")
    assert cached is not None
    assert isinstance(cached.image, list)
    assert [f.tobytes() for f in cached.image] == [f.tobytes() for f in frames]
    assert (cached.timesteps, cached.seconds, cached.trajectory.shape) == ([9.0, 5.0, 2.0, 1.0], 0.5, (4, 2, 3))
    assert cache.get("cd34") is None


def test_prune_keeps_the_latest(tmp_path: Path) -> None:
    import os

    image = Image.new("RGB", (8, 8))
    cache = PictureCache(tmp_path, limit=1)
    for i, key in enumerate(("aa", "bb", "cc")):
        cache.put(key, Sample(image, torch.zeros(1, 1), [1.0], 0.1))
        os.utime(cache._path(key), (i, i))
    cache.limit = 2 * cache._path("aa").stat().st_size
    cache.prune()
    assert [cache.get(key) is None for key in ("aa", "bb", "cc")] == [True, False, False]


# ---------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    pipe = tiny_pixart()
    identity = fingerprint(pipe)
    assert identity == fingerprint(tiny_pixart())
    assert identity != fingerprint(tiny_pixart(seed=1))
    pipe.save_pretrained(tmp_path / "pipe")
    assert fingerprint(ditq.load(tmp_path / "pipe")) == identity
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(pipe) != identity


def test_fingerprint_sees_scheduler_dtype_and_quantization(tmp_path: Path) -> None:
    import diffusers

    pipe = tiny_pixart()
    seen = {fingerprint(pipe)}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    seen.add(fingerprint(pipe))
    ditq.quantize(pipe, "rtn-w8a8")
    quantized = fingerprint(pipe)
    seen.add(quantized)
    pipe.save_pretrained(tmp_path / "w8a8")
    assert fingerprint(ditq.load(tmp_path / "w8a8")) == quantized
    pipe.vae.to(torch.bfloat16)
    seen.add(fingerprint(pipe))
    assert len(seen) == 4


# -------------------------------------------------------------------------------------------- samples


def test_trajectory_has_every_step() -> None:
    samples = sample(tiny_dit(), DIT, CLASSES, Sampling(**{**OPTIONS, "steps": 3}))
    assert samples.trajectory.shape == (4, 3, 4, 8, 8)
    assert torch.equal(samples.latents, samples.trajectory[:, -1])
    assert samples.timesteps == sorted(samples.timesteps, reverse=True)
    assert not torch.equal(samples.trajectory[:, 0], samples.trajectory[:, 1])
    assert min(samples.seconds) > 0
    assert not samples.is_video


def test_scheduler_is_left_as_it_was() -> None:
    pipe = tiny_pixart()
    sample(pipe, architectures.load("pixart"), PROMPTS[:1], Sampling(**OPTIONS))
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "²"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITQ_CACHE_BYTES", text)
    with pytest.raises(UsageError, match="DITQ_CACHE_BYTES must be a whole number"):
        PictureCache()
