"""The base classifier of a name: a bundled one, a network in a folder, or the result of a function."""

import importlib
import sys
import warnings
from typing import Literal

from etils import epath

from ancer_jax._checks import check_choice
from ancer_jax._messages import did_you_mean
from ancer_jax.data import Dataset, check_classes
from ancer_jax.models.bundled import BUNDLED_BY_NORM, bundled_models, load_bundled
from ancer_jax.models.checkpoints import TRAINING_SETTINGS, Checkpoint, is_network, load_network
from ancer_jax.search.theta_map import ThetaMap
from ancer_jax.smoothing.classifier import Classifier


def resolve_classifier(
    name: str, norm: str, theta: float | ThetaMap | None
) -> tuple[Classifier, float | ThetaMap, Checkpoint | None]:
    """The base classifier of a name, its noise parameter, and its checkpoint (None for that of a function).

    The name is that of a bundled model (`bundled_models`), "bundled" (the one for the bundled images and this norm),
    the folder of a network (`save_network`), or "module:function", of a function without arguments that returns a
    `Classifier`. The noise parameter is theta or, if that is None, the theta or the theta map of training.

    Raises:
      ValueError: if there is no such classifier, or theta is None and that of training is unknown or of another norm.
    """
    check_choice("norm", norm, Literal["l2", "l1"])
    bundled = ["bundled", *bundled_models()]
    if name in bundled or is_network(name):
        of_norm = BUNDLED_BY_NORM[norm] if name == "bundled" else name
        checkpoint = load_bundled(of_norm).checkpoint if name in bundled else load_network(name)
        return checkpoint.classifier, _theta(name, checkpoint, norm, theta), checkpoint
    if epath.Path(name).is_file():
        raise ValueError(f"--classifier {name} is a file: ancer-jax convert makes the folder of a network from it")
    if (epath.Path(name) / TRAINING_SETTINGS).exists():
        raise ValueError(f"--classifier {name}: its training is not finished; the same ancer-jax train continues it")
    if ":" not in name:
        known = f"a bundled model ({', '.join(bundled)})"
        what = f"neither {known}, nor the folder of a network, nor module:function{did_you_mean(name, bundled)}"
        raise ValueError(f"--classifier {name!r} is {what}")
    if theta is None:
        raise ValueError("--sigma is needed for your own classifier: the noise it was trained with")
    return _call(name), theta, None


def _theta(name: str, checkpoint: Checkpoint, norm: str, theta: float | ThetaMap | None) -> float | ThetaMap:
    known = checkpoint.theta if checkpoint.theta_map is None else checkpoint.theta_map
    if checkpoint.norm != norm and known is not None:
        noise = str(known) if isinstance(known, ThetaMap) else f"{known:g}"
        trained = f"{name} was trained with {checkpoint.norm} noise of {noise}"
        if theta is None:
            raise ValueError(f"{trained}: --sigma is needed to certify it under {norm} noise")
        warnings.warn(f"{trained}, not with {norm} noise", stacklevel=3)
    if theta is not None:
        return theta
    if known is None:
        raise ValueError(f"--sigma is needed: {name} does not say what noise it was trained with")
    return known


def _call(name: str) -> Classifier:
    """The classifier that the function named "module:function" returns; modules of the working directory come first."""
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, "")
        classifier = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        hint = " (module:function, without .py)" if module.endswith(".py") else ""
        raise ValueError(f"--classifier {name!r}: {str(error) or type(error).__name__}{hint}") from error
    if not isinstance(classifier, Classifier):
        raise ValueError(f"--classifier {name!r} returned {type(classifier).__name__}, not a Classifier")
    return classifier


def check_fit(name: str, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """ValueError if images or labels are not like those that the network called `name` was trained on."""
    shape = tuple(dataset.images.shape[1:])
    if shape != checkpoint.image_shape:
        wanted, found = (" x ".join(map(str, sizes)) for sizes in (checkpoint.image_shape, shape))
        raise ValueError(f"{name} takes images {wanted}, the data are {found} (--classifier, --data, --crop)")
    check_classes(dataset, checkpoint.classes)
    if 2 * dataset.num_classes <= checkpoint.network.num_classes:
        known = f"{name} knows {checkpoint.network.num_classes}"
        warnings.warn(f"{dataset.name} has labels of {dataset.num_classes} classes, {known}", stacklevel=2)
