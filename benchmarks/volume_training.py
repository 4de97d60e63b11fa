"""Training for certified volume: ACR against noise augmentation and the most similar method of the field.

    python benchmarks/volume_training.py [--epochs 20] [--seeds 0 1 2]    # half an hour on two CPU cores
    python benchmarks/volume_training.py --small                          # one epoch, one seed

As in benchmarks/training.py: the small network on the 2,000 bundled training images, 250 test images certified with
n = 2,000 under the noise of the training. Gaussian noise of 0.25 (l2) and uniform noise of 0.5 (l1), for which there is
no MACER. All methods see the same number of noisy copies of an image.

Exit status 1 if volume, averaged over the seeds, does not beat augmentation for both norms.
"""

import sys
import tempfile

import numpy as np
import record
from training import SETTINGS, measure, parse

METHODS = {
    "l2": ("augmentation, 8 copies", "macer", "volume"),
    "l1": ("augmentation, 8 copies", "stability, 8 copies", "volume"),
}
THETA, VOLUME = {"l2": 0.25, "l1": 0.5}, {"copies": 8, "weight": 8.0}


def main() -> int:
    options, rows, acr = parse(__doc__), [], {}
    for norm, methods in METHODS.items():
        for name in methods:
            settings = SETTINGS.get(name.split(",")[0], VOLUME) | {"copies": 8, "norm": norm, "theta": THETA[norm]}
            with tempfile.TemporaryDirectory() as folder:
                for seed in options.seeds:
                    rows.append({"norm": norm} | measure(name, options.epochs, seed, folder, **settings))
                    print(rows[-1], flush=True)
            acr[f"{norm}, {name}"] = float(np.mean([row["acr"] for row in rows[-len(options.seeds) :]]))
    record.show(rows)
    stored = {"epochs": options.epochs, "rows": rows, "acr": acr}
    record.save("volume_training", stored, seed=options.seeds, small=options.small)
    passed = all(acr[f"{norm}, volume"] > acr[f"{norm}, augmentation, 8 copies"] for norm in METHODS)
    print(acr, "passed" if passed else "MISSED A BAR")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
