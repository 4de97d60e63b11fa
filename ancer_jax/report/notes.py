"""What must be said beside figures and pictures: marks of runs, and notes on what their certificates promise."""

from ancer_jax.basis import BasisName, Pixels
from ancer_jax.metrics import round_down, round_up
from ancer_jax.report.results import LEAKY_ABOVE, Results

NOT_RECONCILED = "per-input classifiers, not reconciled by memory"
UNKNOWN = "the table does not say whether theta was chosen for each image; if it was, these are " + NOT_RECONCILED
TWO_CLAIMS = (
    "With one theta for all images, a certificate speaks of any input in its region. With memory, a certificate speaks "
    "of inputs that are served after its image (in the order of ids), and inside a stored region the memory answers by "
    "rule. These are two threat models: a larger figure does not mean that its classifier is more robust."
)
_TWO_CLAIMS_IN_SHORT = "Two threat models: one theta for all images, any input; with memory, inputs served later."
_MARKS = {"*": NOT_RECONCILED, "?": UNKNOWN}
# What a theta map shows, and where its coefficients are; of pixels nothing needs to be said.
THETA_BY: dict[BasisName, tuple[str, str]] = {
    "pixels": ("theta", ""),
    "cosine": (
        "theta by frequency",
        "Low frequencies are at the top left: a step down is one more half wave from top to bottom, a step right one "
        "more from left to right.",
    ),
    "karhunen-loeve": (
        "theta by coefficient",
        "Patterns, down and to the right, are in order of falling variance of the images: low frequencies are mostly "
        "at the top left.",
    ),
}


def mark(results: Results) -> str:
    """The name of a run, marked if its certificates are not of one classifier, or not known to be."""
    return results.name + _mark(results)


def _mark(results: Results) -> str:
    return "" if results.reconciled else "?" if results.data_dependent is None else "*"


def legend_of_marks(results: list[Results]) -> list[str]:
    """What the marks of these runs mean."""
    return [f"{sign} {why}" for sign, why in _MARKS.items() if sign in map(_mark, results)]


def two_claims(results: list[Results]) -> list[str]:
    """`TWO_CLAIMS`, if theta is chosen per image in some of these runs, and not, or not known to be, in others."""
    kinds = {r.data_dependent for r in results}
    return [TWO_CLAIMS] if True in kinds and len(kinds) > 1 else []


def footnotes(results: list[Results]) -> list[str]:
    """The lines below figures or a picture of these runs: in short that there are two threat models, and the marks."""
    return ([_TWO_CLAIMS_IN_SHORT] if two_claims(results) else []) + legend_of_marks(results)


def caveats(results: list[Results], leaky_above: float = LEAKY_ABOVE) -> list[str]:
    """What must stand right beside the main figures: that a run is unfinished, what is left without leaky thetas."""
    said = []
    for r in results:
        if not r.finished:
            these = f"its figures are of the {len(r.correct)} images that are certified so far"
            said.append(f"{mark(r)} is unfinished: {these}. The same ancer-jax certify continues it.")
        kept, leaky = r.leaks_at_most(leaky_above), r.leaky(leaky_above)
        if kept is not None and leaky:
            share = f"{leaky} of {len(r.leakages())} thetas leak more than {shortest(leaky_above)}"
            columns = {"ACR": "radius", "ACR-tilde": "radius_proxy"}
            both = {name: (r.acr(column, kept), r.acr(column)) for name, column in columns.items()}
            figures = [f"{name} is {round_down(a, 3)} instead of {round_down(b, 3)}" for name, (a, b) in both.items()]
            said.append(f"{mark(r)}: {share}. Without leaky thetas, {', '.join(figures)}.")
    return said


def notes(results: list[Results]) -> list[str]:
    """The notes below a table of these runs."""
    said, configs = [], [(r.name, r.config) for r in results if r.config]
    images = [sorted(zip(r["idx"].tolist(), r["label"].tolist(), strict=True)) for r in results]
    if any(these != images[0] for these in images):
        said.append("These runs are not of the same images: their figures cannot be compared.")
    if len({r.norm for r in results if r.norm}) > 1:
        said.append("These runs are of different norms: their figures cannot be compared.")
    said += two_claims(results)
    with_memory = [r for r in results if r.data_dependent and r.reconciled]
    if any(r.alpha != 0 for r in with_memory):
        said.append(
            "A certificate by itself fails with probability at most alpha. After memory, a line holds if its own "
            "certificate and those of all earlier images hold: the i-th line with probability at least 1 - i alpha."
        )
    if any(r.leaks_at_most(LEAKY_ABOVE) is not None for r in with_memory):
        said.append(
            "Figures without leaky thetas count an image as 0 if its theta is leaky, or its leakage is not known. Its "
            "region stays in the memory, and may have changed other regions."
        )
    sequential = [(name, config.sampling.radii) for name, config in configs if config.sampling]
    if decided := [f"{name}: {', '.join(map(shortest, radii))}" for name, radii in sequential if radii]:
        said.append(
            f"Sampling stopped as soon as these radii were decided ({'; '.join(decided)}). At other radii, and in "
            "means and medians, regions may be larger than these figures show."
        )
    carried = [(r, how) for r in results if r.run and (how := r.run.carried)]
    if names := [f"{r.name} ({how.n:,} common draws, alpha = {alpha_of(r)})" for r, how in carried]:
        said.append(
            f"Carried from certificates of another network: {', '.join(names)}. Their count and n are "
            "those of that network, time and passes those of carrying alone. Leakage is not measured again."
        )
    exact = [(name, config.certified_noise) for name, config in configs if config.enumerable]
    for inputs in dict.fromkeys(noise.certified_inputs for _, noise in exact):
        names = [name for name, noise in exact if noise.certified_inputs == inputs]
        said.append(f"Exact certificates, without alpha, for {inputs}: {', '.join(names)}.")
    if names := [r.name for r in results if r.run is None and "gap" not in r.columns]:
        tables = f"Tables of other tools ({', '.join(names)})"
        said.append(f"{tables} have radii as these rounded them, to the nearest as a rule: figures may be too large.")
    if names := [name for name, config in configs if config.certify.bound == "separate"]:
        said.append(f"Separate bounds of the class and of the second class, at half of alpha each: {', '.join(names)}.")
    if names := [name for name, config in configs if config.noise == "splitting"]:
        said.append(f"Splitting noise: {', '.join(names)}.")
    coloured = [(r, c) for r, c in configs if c.basis != Pixels() and c.method in ("universal", "ancer")]
    if names := [f"{name} ({config.basis.name})" for name, config in coloured]:
        said.append(f"Coloured noise, with one theta for each coefficient of a basis: {', '.join(names)}.")
    errors = [(mark(r), *r.standard_errors()) for r in results if len(r.correct) > 1]
    if errors:
        each = "; ".join(f"{name} {round_up(a, 3)}, {round_up(b, 3)}" for name, a, b in errors)
        said.append(f"Standard errors of accuracy and ACR, over the choice of images: {each}.")
    return said + legend_of_marks(results)


def alpha_of(results: Results) -> str:
    """The error probability of each certificate of a run, as a sum if it was carried."""
    return " + ".join(map(shortest, results.alphas))


def shortest(number: float) -> str:
    """The shortest text that is this number and no other one."""
    return text if float(text := f"{number:g}") == number else repr(float(number))
