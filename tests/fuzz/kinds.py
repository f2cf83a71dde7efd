"""The kinds of files that ditq reads. Each is written once, damaged in a copy, and read as a user would."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import mutations
import torch
import yaml
from helpers import SCHEDULER, run, tiny_model, tiny_statistics, tiny_vae
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from toy import EVOLUTION, IDENTITY, toy_fitness, toy_space

import ditq
from ditq import allocation, architectures, digests, recipe
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.calibration import statistics as statistics_module
from ditq.checkpoint.folder import read_plan
from ditq.checkpoint.verify import metadata
from ditq.conversion import draft, quantize_model
from ditq.errors import DitqError
from ditq.openvino import manifest
from ditq.openvino.runtime import why_unavailable
from ditq.plan import Plan
from ditq.recipe import Recipe
from ditq.sampling import PictureCache
from ditq.sampling import cache as cache_module
from ditq.sampling.cache import Sample

EQUAL, VALID, RECOMPUTED, SILENT = "loaded equal", "another valid file", "recomputed", "silent"

FILE = Path("transformer/diffusion_pytorch_model.safetensors")
SETTINGS = Path("transformer/config.json")
OLD = Path(__file__).resolve().parent.parent / "data" / "v0.1" / "dit-timesteps"
WIDTH = {"num_attention_heads": 2, "num_layers": 1, "num_embeds_ada_norm": 1000}
RECIPES = ("viditq-w4a8", "smoothquant-w8a8", "ptq4dit-w4a8", "qdit-w4a8", "rtn-w8a8", "smoothquant-static-w8a8")
PICTURE = "0123456789abcdef"
TRIALS = 8


# ---------------------------------------------------------------------------------------- originals


@cache
def model() -> Any:
    return tiny_model("dit", **WIDTH)


@cache
def statistics() -> Statistics:
    return tiny_statistics(model(), "dit")


def build(base: Path) -> None:
    """Writes the undamaged files of every kind below ``base``."""
    pipe = diffusers.DiTPipeline(
        transformer=copy.deepcopy(model()), vae=tiny_vae(), id2label={i: f"thing{i}" for i in range(3)},
        scheduler=diffusers.DPMSolverMultistepScheduler(**SCHEDULER),
    )  # fmt: skip
    ditq.quantize(pipe, "smoothquant-w4a8", statistics=copy.deepcopy(statistics()))
    ditq.save(pipe, base / "pipeline")
    shutil.copytree(base / "pipeline", base / "shards")
    shutil.rmtree(base / "shards" / "transformer")
    pipe.transformer.save_pretrained(base / "shards" / "transformer", max_shard_size="100KB")
    shutil.copytree(OLD, base / "old")
    if why_unavailable() is None:
        from ditq import api

        ditq.quantize(plain := diffusers.DiTPipeline(copy.deepcopy(model()), tiny_vae(), pipe.scheduler), "rtn-w8a8")
        ditq.save(plain, base / "w8a8")
        api.export(base / "w8a8", base / "exported")
    for name in RECIPES:
        (base / f"{name}.yaml").write_text(yaml.safe_dump(recipe.load(name).model_dump(mode="json")))
    for name in architectures.names():
        text = architectures.architecture.resources.files("ditq").joinpath(f"architectures/{name}.yaml").read_text()
        (base / f"{name}.architecture.yaml").write_text(text)
    plan = pipe.transformer.hf_quantizer.plan
    (base / "plan.json").write_text(plan.to_json())
    copy.deepcopy(statistics()).save(base / "statistics.safetensors")
    picture().put(base)
    search(base / "search")


class picture:  # noqa: N801
    """A picture in a cache."""

    def put(self, base: Path) -> None:
        torch.manual_seed(1)
        image = Image.fromarray((torch.rand(8, 8, 3) * 255).to(torch.uint8).numpy())
        PictureCache(base / "pictures").put(PICTURE, Sample(image, torch.randn(2, 4, 4, 4), [999.0, 499.0], 0.5))

    def get(self, base: Path) -> Any:
        found = PictureCache(base / "pictures").get(PICTURE)
        return found and (found.image.tobytes(), found.trajectory.tolist(), found.timesteps, found.seconds)


def search(storage: Path) -> Any:
    found = allocation.run(
        toy_space(), EVOLUTION, toy_fitness, trials=TRIALS, storage=storage, identity=IDENTITY, patience=0.2
    )
    return found.scored


# --------------------------------------------------------------------------------------- checkpoints


def state(folder: Path) -> tuple[Any, ...]:
    """All of a loaded pipeline that its pictures depend on."""
    pipe = ditq.load(folder)
    return (
        type(pipe).__name__,
        type(pipe.scheduler).__name__,
        str(dict(pipe.scheduler.config)),
        *_of(pipe.transformer),
    )


def old_state(folder: Path) -> tuple[Any, ...]:
    return _of(diffusers.DiTTransformer2DModel.from_pretrained(folder))


def _of(transformer: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    output = run(transformer, "dit")
    tensors = {name: digests.of_tensor(x) for name, x in transformer.state_dict().items()}
    quantizer = getattr(transformer, "hf_quantizer", None)
    return (quantizer and quantizer.plan.binding(), digests.of_tensor(output), digests.of_json(tensors))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def forge(folder: Path) -> bool:
    """Recomputes the checksums and the binding to config.json, as somebody would who knows the format."""
    try:
        tensors, texts = read(folder / FILE)
        plan = read_plan(folder)
        if plan is None:
            return False
        texts |= metadata(tensors, plan, json.loads((folder / SETTINGS).read_text()))
    except (DitqError, SafetensorError, ValueError, RecursionError):
        return False  # nothing to recompute; it has to be refused as it is
    save_file(tensors, folder / FILE, texts)
    return True


def edit_json(random: Random, path: Path, inside: str | None = None) -> None:
    content = json.loads(path.read_text())
    if inside:
        content[inside] = mutations.tree(random, content[inside])
    else:
        content = mutations.tree(random, content)
    path.write_text(mutations.as_json(content))


def edit_bytes(random: Random, path: Path, most: int | None = None) -> None:
    path.write_bytes(mutations.bytes_of(random, path.read_bytes(), most))


def edit_header(random: Random, path: Path) -> None:
    """Changes fields of a safetensors header; the length in front of it is right again."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = mutations.as_json(mutations.tree(random, json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def damage_safetensors(random: Random, path: Path) -> None:
    kind = random.randrange(4)
    if kind == 0:
        edit_header(random, path)
    elif kind == 1:
        size = int.from_bytes(path.read_bytes()[:8], "little")
        edit_bytes(random, path, 8 + size)
    elif kind == 2:
        edit_bytes(random, path)
    else:
        tensors, texts = read(path)
        save_file(mutations.tensors(random, tensors), path, texts)


# ------------------------------------------------------------------------------------------ the kinds


class Kind:
    """A file, how it is damaged, and how it is read.

    Attributes:
        files: names below the folder of originals that an input needs.
        forged: whether the last damage included all checksums, so that another content is a valid file.
    """

    files: tuple[str, ...] = ("pipeline",)
    forged = False

    def damage(self, random: Random, work: Path) -> None:
        raise NotImplementedError

    def read(self, work: Path) -> Any:
        """What the files say, in a form that ``==`` compares; raises if ditq refuses them."""
        raise NotImplementedError

    def judge(self, found: Any, original: Any) -> str:
        if found == original:
            return EQUAL
        return VALID if self.forged else SILENT


class Tensors(Kind):
    def damage(self, random: Random, work: Path) -> None:
        damage_safetensors(random, work / "pipeline" / FILE)
        self.forged = random.random() < 0.4 and forge(work / "pipeline")

    def read(self, work: Path) -> Any:
        return state(work / "pipeline")


class OldTensors(Kind):
    files = ("old",)

    def damage(self, random: Random, work: Path) -> None:
        damage_safetensors(random, work / "old" / FILE.name)

    def read(self, work: Path) -> Any:
        return old_state(work / "old")


class Shards(Kind):
    files = ("shards",)

    def damage(self, random: Random, work: Path) -> None:
        folder = work / "shards" / "transformer"
        shards = sorted(folder.glob("*.safetensors"))
        index = next(folder.glob("*.index.json"))
        if random.random() < 0.7:
            random.choice((edit_json, edit_bytes))(random, index)
        elif random.random() < 0.5:
            random.choice(shards).unlink()
        else:
            damage_safetensors(random, random.choice(shards))

    def read(self, work: Path) -> Any:
        return state(work / "shards")


class Config(Kind):
    def damage(self, random: Random, work: Path) -> None:
        path = work / "pipeline" / SETTINGS
        if random.random() < 0.2:
            edit_bytes(random, path)
        else:
            edit_json(random, path, random.choice((None, "quantization_config", "quantization_config")))
        self.forged = random.random() < 0.5 and forge(work / "pipeline")

    def read(self, work: Path) -> Any:
        return state(work / "pipeline")


class Index(Kind):
    """``model_index.json`` and the scheduler's config, which belong to diffusers: nothing binds them."""

    def damage(self, random: Random, work: Path) -> None:
        name = random.choice(("model_index.json", "model_index.json", "scheduler/scheduler_config.json"))
        random.choice((edit_json, edit_json, edit_bytes))(random, work / "pipeline" / name)
        self.forged = True

    def read(self, work: Path) -> Any:
        return state(work / "pipeline")


class RecipeFile(Kind):
    files = tuple(f"{name}.yaml" for name in RECIPES)

    def damage(self, random: Random, work: Path) -> None:
        self.forged, self.tried = True, random.random() < 0.1
        source = work / f"{random.choice(RECIPES)}.yaml"
        damage_yaml(random, source, work / "mine.yaml")

    def read(self, work: Path) -> Any:
        path = work / "mine.yaml"
        loaded = recipe.load(path if path.is_file() else work / self.files[0])
        if self.tried and path.is_file():
            carry_out(loaded)
        elif path.is_file():
            draft(model(), architectures.load("dit"), loaded)
        return loaded


class ArchitectureFile(Kind):
    files = tuple(f"{name}.architecture.yaml" for name in ("dit", "pixart", "wan", "stdit3"))

    def damage(self, random: Random, work: Path) -> None:
        self.forged = True
        source = work / ("dit.architecture.yaml" if random.random() < 0.6 else random.choice(self.files))
        damage_yaml(random, source, work / "mine.yaml")

    def read(self, work: Path) -> Any:
        path = work / "mine.yaml"
        loaded: Architecture = architectures.load(path if path.is_file() else work / self.files[0])
        if path.is_file():
            draft(model(), loaded, recipe.load("rtn-w8a8"))
        return loaded


class PlanFile(Kind):
    files = ("plan.json",)

    def damage(self, random: Random, work: Path) -> None:
        self.forged, self.tried = True, random.random() < 0.1
        random.choice((edit_json, edit_json, edit_bytes))(random, work / "plan.json")

    def read(self, work: Path) -> Any:
        from ditq.cli.quantize import _read

        plan = _read(work / "plan.json")
        if getattr(self, "tried", False):
            carry_out(plan)
        return plan


class CalibrationCache(Kind):
    files = ("statistics.safetensors",)

    def damage(self, random: Random, work: Path) -> None:
        path = work / self.files[0]
        damage_safetensors(random, path)
        self.forged = random.random() < 0.3 and forge_cache(path, "ditq", "sha256", _statistics_sum)

    def read(self, work: Path) -> Any:
        loaded = Statistics.load(work / self.files[0])
        content = {n: [digests.of_tensor(x) for x in vars(g).values()] for n, g in loaded.groups.items()}
        return (loaded.timesteps.tolist(), content, str(loaded.calls))


class Pictures(Kind):
    files = ("pictures",)

    def damage(self, random: Random, work: Path) -> None:
        path = PictureCache(work / "pictures")._path(PICTURE)
        damage_safetensors(random, path)
        self.forged = random.random() < 0.3 and forge_cache(path, "sample", "checksum", _picture_sum)

    def read(self, work: Path) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = picture().get(work)
        if found is None:
            assert any("damaged" in str(w.message) for w in caught), "a damaged picture was dropped without a word"
        return found

    def judge(self, found: Any, original: Any) -> str:
        return RECOMPUTED if found is None else super().judge(found, original)


class Storage(Kind):
    files = ("search",)

    def damage(self, random: Random, work: Path) -> None:
        path = work / "search"
        if random.random() < 0.5:
            edit_bytes(random, path)
            return
        lines = path.read_text().splitlines(keepends=True)
        at = random.randrange(len(lines))
        kind = random.randrange(4)
        if kind == 0:
            lines[at] = mutations.as_json(mutations.tree(random, json.loads(lines[at]))) + "\n"
        elif kind == 1:
            del lines[at : at + random.choice((1, 10, 10_000))]
        elif kind == 2:
            lines.insert(random.randrange(len(lines)), lines[at])
        else:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        path.write_text("".join(lines))

    def read(self, work: Path) -> Any:
        return search(work / "search")


class Exported(Kind):
    files = ("exported",)

    def damage(self, random: Random, work: Path) -> None:
        folder = work / "exported" / "transformer" / "openvino"
        self.forged = False
        if random.random() < 0.25:
            edit_bytes(random, random.choice(sorted(folder.iterdir())))
            return
        random.choice((edit_json, edit_json, edit_bytes))(random, folder / manifest.FILE)
        if random.random() < 0.4:
            (folder / manifest.BINDING).write_text(manifest._binding(folder, read_plan(work / "exported")) + "\n")
            self.forged = True

    def read(self, work: Path) -> Any:
        pipe = ditq.load(work / "exported")
        return tuple(run(pipe.transformer, "dit").flatten().tolist())


def _statistics_sum(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> str:
    return statistics_module._checksum(tensors, info["calls"])


def _picture_sum(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> str:
    return cache_module._checksum(PICTURE, info, tensors["frames"], tensors["trajectory"])


def forge_cache(path: Path, key: str, field: str, checksum: Callable[..., str]) -> bool:
    """Recomputes the checksum of a cache file, which is a field of a JSON object in its metadata."""
    try:
        tensors, texts = read(path)
        info = json.loads(texts[key])
        info.pop(field, None)
        info[field] = checksum(tensors, info)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError):
        return False
    save_file(tensors, path, {key: json.dumps(info)})
    return True


def damage_yaml(random: Random, source: Path, out: Path) -> None:
    if random.random() < 0.25:
        out.write_bytes(mutations.bytes_of(random, source.read_bytes()))
    else:
        content = mutations.tree(random, yaml.safe_load(source.read_text()))
        out.write_text(mutations.as_yaml(random, content), encoding="utf-8", errors="surrogatepass")


def carry_out(job: Recipe | Plan) -> None:
    quantize_model(copy.deepcopy(model()), architectures.load("dit"), job, copy.deepcopy(statistics()))


KINDS: dict[str, Callable[[], Kind]] = {
    "safetensors": Tensors,
    "safetensors of 0.1": OldTensors,
    "shard map": Shards,
    "config.json": Config,
    "config.json ": Config,  # twice: it has the most fields
    "model_index.json": Index,
    "recipe": RecipeFile,
    "architecture": ArchitectureFile,
    "plan": PlanFile,
    "calibration cache": CalibrationCache,
    "image cache": Pictures,
    "search storage": Storage,
    "exported folder": Exported,
}
