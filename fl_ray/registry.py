"""What a recipe's ``name`` may say: registered names, or ``package.module:Class`` of the user's own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_ray.errors import SettingError

__all__ = ["BASES", "REGISTRY", "Entry", "code_hash", "import_target", "nearest", "resolve_name"]


@dataclass(frozen=True)
class Entry:
    """Where a registered component is (``module:attribute``, imported when used) and what it is, in one line."""

    target: str
    summary: str


_DATA, _PARTS, _NETS = "fl_ray.data.datasets", "fl_ray.data.partitioners", "lightning_modules.networks"
_BACKBONES = "lightning_modules.backbones"

REGISTRY: dict[str, dict[str, Entry]] = {
    "method": {
        "fedavg": Entry(
            "fl_ray.methods.fedavg:FedAvg", "size-weighted average of the clients' updates, FedOpt servers"
        ),
        "fedprox": Entry("fl_ray.methods.fedprox:FedProx", "fedavg with a proximal term in every client's loss"),
        "scaffold": Entry("fl_ray.methods.scaffold:Scaffold", "control variates against client drift (plain SGD)"),
        "fednova": Entry("fl_ray.methods.fednova:FedNova", "updates normalised by each client's local steps (SGD)"),
        "feddyn": Entry("fl_ray.methods.feddyn:FedDyn", "dynamic regularisation that aligns the clients' optima"),
        "coordinate_median": Entry("fl_ray.methods.robust:CoordinateMedian", "the median of every coordinate"),
        "trimmed_mean": Entry("fl_ray.methods.robust:TrimmedMean", "every coordinate's mean without its extremes"),
        "krum": Entry("fl_ray.methods.robust:Krum", "the client nearest to its neighbours; multi-Krum"),
        "genfl": Entry(
            "fl_ray.methods.genfl:GenFL", "fedavg joined by a server-side model trained on synthetic images"
        ),
        "genfl_pretrain": Entry(
            "fl_ray.methods.genfl_pretrain:GenFLPretrain", "fedavg from a model pre-trained on synthetic images"
        ),
        "fimi": Entry("fl_ray.methods.fimi:FIMI", "fedavg on local and planned synthetic data, at least energy"),
        "tfl": Entry("fl_ray.methods.fimi:TFL", "FIMI's baseline: planned resources, no synthesis"),
        "hdc": Entry("fl_ray.methods.fimi:HDC", "FIMI's baseline: classes filled up whatever the energy"),
        "semi": Entry("fl_ray.methods.fimi_server:SEMI", "FIMI's baseline: a server's model joins the average"),
        "sst": Entry("fl_ray.methods.fimi_server:SST", "FIMI's baseline: the average is fine-tuned at the server"),
        "clsd": Entry("fl_ray.methods.fimi_server:CLSD", "FIMI's baseline: one model on synthetic data alone"),
        "fedlmg": Entry(
            "fl_ray.methods.fedlmg:FedLMG", "one round: clients' classifiers guide the server's diffusion model"
        ),
        "prompts_only": Entry(
            "fl_ray.methods.reference:PromptsOnly", "one model on the generator's images, no guidance"
        ),
        "feddf": Entry("fl_ray.methods.one_shot:FedDF", "one round: the clients' mean logits distilled"),
        "dense": Entry("fl_ray.methods.dense:Dense", "one round: the clients' ensemble distilled, data-free"),
        "ensemble": Entry("fl_ray.methods.one_shot:Ensemble", "one round: the clients' classifiers vote"),
        "local_only": Entry("fl_ray.methods.reference:LocalOnly", "every client by itself; mean over clients' models"),
        "centralised": Entry(
            "fl_ray.methods.reference:Centralised", "one model on the pooled client data: the ceiling"
        ),
        "public_only": Entry("fl_ray.methods.reference:PublicOnly", "one model on the public images the generator saw"),
    },
    "data": {
        "digits": Entry(f"{_DATA}:digits", "scikit-learn's 1,797 digits, 8x8 grey, embedded"),
        "mnist": Entry(f"{_DATA}:mnist", "MNIST, 28x28 grey, 10 classes"),
        "fashion_mnist": Entry(f"{_DATA}:fashion_mnist", "Fashion-MNIST, 28x28 grey, 10 classes"),
        "cifar10": Entry(f"{_DATA}:cifar10", "CIFAR-10, 32x32 RGB, 10 classes"),
        "cifar100": Entry(f"{_DATA}:cifar100", "CIFAR-100, 32x32 RGB, 100 classes"),
        "gtsrb": Entry(f"{_DATA}:gtsrb", "German traffic signs resized to 32x32 RGB, 43 classes"),
        "digit_domains": Entry("fl_ray.data.domains:digit_domains", "MNIST, MNIST-M and USPS as domains, RGB"),
        "random": Entry(f"{_DATA}:random", "random images and labels, for timing"),
        "image_folder": Entry(
            "fl_ray.data.folders:image_folder", "images in folders by domain and class, or by class and context"
        ),
    },
    "partition": {
        "iid": Entry(f"{_PARTS}:IID", "shuffled, equal parts"),
        "dirichlet": Entry(f"{_PARTS}:DirichletPerClass", "each class split over clients by Dir(alpha)"),
        "dirichlet_client": Entry(f"{_PARTS}:DirichletPerClient", "each client's class mix drawn from Dir(alpha)"),
        "shards": Entry(f"{_PARTS}:Shards", "sorted by class, k shards per client"),
        "label_blocks": Entry(f"{_PARTS}:LabelBlocks", "client i owns a block of classes"),
        "quantity": Entry(f"{_PARTS}:QuantitySkew", "same class mix, sizes from Dir(alpha)"),
        "domain": Entry(f"{_PARTS}:DomainSkew", "every client's images come from one domain"),
        "natural": Entry(f"{_PARTS}:Natural", "by the data set's own client ids"),
        "resampled": Entry(f"{_PARTS}:Resampled", "a population of any size, whose clients share samples"),
    },
    "model": {
        "mlp": Entry(f"{_NETS}:MLP", "fully connected, ReLU"),
        "small_cnn": Entry(f"{_NETS}:SmallCNN", "two convolutions and a hidden layer"),
        "dropout_cnn": Entry(f"{_NETS}:DropoutCNN", "the CIFAR-10 CNN of pfl-research's benchmarks"),
        "vgg9": Entry(f"{_NETS}:VGG9", "VGG-9, 3,491,530 parameters at 3x32x32 and 10 classes"),
        "resnet18": Entry(f"{_NETS}:ResNet18", "ResNet-18 with a stem for 32x32"),
        "resnet34": Entry(f"{_NETS}:ResNet34", "ResNet-34 with a stem for 32x32"),
        "mobilenet_v2": Entry(f"{_BACKBONES}:MobileNetV2", "MobileNetV2 at the data's size"),
        "mobilenet_v3_small": Entry(f"{_BACKBONES}:MobileNetV3Small", "MobileNetV3-small at the data's size"),
        "shufflenet_v2": Entry(f"{_BACKBONES}:ShuffleNetV2", "ShuffleNetV2 at the data's size"),
        "vgg16": Entry(f"{_BACKBONES}:VGG16", "VGG-16 without batch norm, one hidden layer"),
        "small_vit": Entry(f"{_BACKBONES}:SmallViT", "a vision transformer for small images"),
        "torchvision": Entry(f"{_BACKBONES}:TorchvisionClassifier", "torchvision's classifiers as they are, RGB"),
        "exquisite_v1": Entry("lightning_modules.exquisite:ExquisiteNetV1", "ExquisiteNetV1 of TU Delft's GenFL"),
        "cvae": Entry("lightning_modules.cvae:CVAE", "no classifier: the conditional VAE of TU Delft's GenFL"),
    },
    "sampling": {
        "uniform": Entry("fl_ray.sampling.uniform:Uniform", "every client is equally likely to be chosen for a round"),
        "size_weighted": Entry(
            "fl_ray.sampling.size_weighted:SizeWeighted", "probability by samples; updates count alike"
        ),
        "power_of_choice": Entry(
            "fl_ray.sampling.power_of_choice:PowerOfChoice", "of d candidates, those with the highest loss"
        ),
        "oort": Entry(
            "fl_ray.sampling.oort:Oort", "by utility (samples times loss), speed and time since the last choice"
        ),
    },
    "update": {
        "clip": Entry("fl_ray.updates:NormClip", "scale an update down to an L2 norm"),
        "quantise": Entry("fl_ray.updates:Quantise", "stochastic rounding to a few bits, bytes counted"),
        "top_k": Entry("fl_ray.updates:TopK", "keep the largest entries, bytes counted"),
    },
    "generator": {
        "diffusion": Entry(
            "generators.diffusion:DiffusionGenerator", "class-conditional pixel diffusion (UNet2D, DDPM)"
        ),
        "cvae": Entry("generators.cvae:CVAEGenerator", "conditional VAE of TU Delft's GenFL, central or federated"),
        "cgan": Entry("generators.cgan:CGANGenerator", "conditional DCGAN, projection discriminator, 8 to 64 pixels"),
        "folder": Entry("generators.folder:FolderGenerator", "images made earlier: root/<class>/*"),
        "real": Entry("generators.real:RealGenerator", "real images, held out or public ones: the control"),
        "noise": Entry("generators.noise:NoiseGenerator", "uniform noise, whatever the class: the other control"),
        "text_to_image": Entry(
            "generators.text_to_image:TextToImage", "prompts to a diffusers pipeline, as Stable Diffusion v1-5"
        ),
        "unconditional": Entry(
            "generators.unconditional:Unconditional", "a diffusers pipeline without classes, for FedLMG's guides"
        ),
        "dit": Entry("generators.dit:DiT", "class ids to a diffusion transformer (diffusers' DiTPipeline)"),
    },
}


BASES = {  # what components of these kinds derive from, a user's own, too
    "method": "fl_ray.methods.base:Method",
    "sampling": "fl_ray.sampling.base:ClientSampler",
    "update": "fl_ray.updates:UpdateProcessor",
    "generator": "generators.base:Generator",
}


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the nearest known word if one is near, and the whole list."""
    known = sorted(set(known))
    near = difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."


def import_target(target: str) -> Any:
    """What ``package.module:attribute`` names."""
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def resolve_name(kind: str, name: str) -> Any:
    """The class or function behind ``name``.

    Args:
        kind: a key of REGISTRY.
        name: a registered name or ``package.module:Class``.

    Raises:
        SettingError: the name is not registered, or its module or attribute can't be imported.
    """
    entries = REGISTRY[kind]
    if name in entries:
        target = entries[name].target
    elif ":" in name:
        target = name
    else:
        own = " Your own goes as package.module:Class."
        raise SettingError(f"{kind}: unknown name {name!r}.{nearest(name, entries)}{own}")
    module_name, _, attribute = target.partition(":")
    try:
        return import_target(target)
    except ImportError as error:
        raise SettingError(
            f"{kind}.name {name!r}: can't import {module_name} ({error}); it must lie in the "
            "working folder or be installed"
        ) from error
    except AttributeError as error:
        raise SettingError(f"{kind}.name {name!r}: {module_name} has no {attribute!r}") from error


def code_hash(kind: str, name: str) -> str | None:
    """A hash of the file of a user's own component (what that imports is not seen); None for ours, whose changes raise
    the formats of what is kept.
    """
    if ":" not in name:
        return None
    file = getattr(sys.modules[resolve_name(kind, name).__module__], "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
