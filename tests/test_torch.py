"""PyTorch modules as base classifiers: the certificates are those of the same network in JAX."""

import functools
import importlib.util
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ancer_jax as aj
from ancer_jax import cli
from ancer_jax.runs import read_run

torch = pytest.importorskip("torch", reason="the tests certify PyTorch modules")
if importlib.util.find_spec("torchax") is None:
    pytest.skip("the tests translate PyTorch modules by torchax", allow_module_level=True)

from ancer_jax.torch import from_module, translate  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = aj.load_dataset("fashion-mnist-subset")
X = IMAGES.images[0]
CONFIG = aj.CertifyConfig(n0=50, n=1000)


class Cnn(torch.nn.Module):
    """Normalises its inputs in place, and has batch norm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("mean", torch.tensor(0.3))
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.norm.running_var.fill_(0.5)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4 * 26 * 26, 10)

    def forward(self, x):
        x -= self.mean
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


class VisionTransformer(torch.nn.Module):
    """Three layers of four heads on sixteen patches and a class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.patches = torch.nn.Conv2d(1, 32, 7, 7)
        self.token = torch.nn.Parameter(torch.zeros(1, 1, 32))
        self.position = torch.nn.Parameter(torch.randn(1, 17, 32))
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 3)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        return 5 * self.head(self.layers(tokens)[:, 0])


class Looking(torch.nn.Module):
    """Decides by the values of a tensor, which a traced program cannot."""

    def forward(self, x):
        x = x.flatten(1)
        return x[:, :10] if float(x.sum()) > 0 else x[:, 10:20]


def cnn_in_jax():
    """The same network, written by hand."""
    module = Cnn().eval()
    of = {name: jnp.asarray(value.numpy()) for name, value in module.state_dict().items()}

    def function(of, x):
        kernel = of["conv.weight"].transpose(2, 3, 1, 0)
        y = jax.lax.conv_general_dilated(
            x - of["mean"], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = (y + of["conv.bias"] - of["norm.running_mean"]) / jnp.sqrt(of["norm.running_var"] + 1e-5)
        y = jax.nn.relu(y * of["norm.weight"] + of["norm.bias"]).transpose(0, 3, 1, 2).reshape(len(x), -1)
        return y @ of["head.weight"].T + of["head.bias"]

    return aj.from_function(function, of, num_classes=10)


def make():
    """For --classifier."""
    return from_module(Cnn(), X)


def make_translated():
    """For --classifier."""
    return translate(Cnn(), X)


@pytest.fixture(scope="module")
def pairs():
    """Each network in PyTorch and in JAX."""
    transformer = VisionTransformer()
    return {
        "cnn": (from_module(Cnn(), X), cnn_in_jax()),
        "translated cnn": (from_module(Cnn(), X), translate(Cnn(), X)),
        "transformer": (from_module(transformer, X), translate(transformer, X)),
    }


each_pair = pytest.mark.parametrize("name", ["cnn", "translated cnn", "transformer"])


@each_pair
def test_certificates_are_the_same_in_pytorch_and_in_jax(pairs, name):
    noises = aj.Gaussian(), aj.Gaussian(aj.basis.Cosine()), aj.Uniform()
    for noise in noises if name == "cnn" else noises[:1]:
        smoothed = [aj.Smoothed(classifier, noise, 0.3) for classifier in pairs[name]]
        hosted, native = (aj.certify(jax.random.key(1), one, X, config=CONFIG, chunk=300) for one in smoothed)
        assert hosted.prediction == native.prediction
        assert abs(int(hosted.count) - int(native.count)) <= 2  # logits differ in their last digits
        answers = [aj.predict_batch(jax.random.key(2), one, IMAGES.images[:3], n=200) for one in smoothed]
        np.testing.assert_array_equal(*answers)


def test_counts_of_ranges_add_up_and_all_draws_vote(pairs):
    hosted, native = (aj.Smoothed(classifier, aj.Gaussian(), 0.3) for classifier in pairs["cnn"])
    votes = [
        aj.smoothing.class_counts(jax.random.key(3), one, X, num_samples=1001, chunk=chunk)
        for one, chunk in ((hosted, 1001), (hosted, 100), (native, 100))
    ]
    np.testing.assert_array_equal(votes[0], votes[1])
    assert votes[0].sum() == 1001
    assert np.abs(votes[0] - votes[2]).max() <= 2


def test_sequential_certificates(pairs):
    sequential = aj.SequentialConfig(radii=(0.1,))
    found = [
        aj.certify_sequentially(jax.random.key(4), aj.Smoothed(one, aj.Gaussian(), 0.3), X, sequential=sequential)
        for one in pairs["cnn"]
    ]
    assert found[0].n == found[1].n
    assert abs(int(found[0].count) - int(found[1].count)) <= 2


@each_pair
@pytest.mark.parametrize("sampling", [None, aj.SequentialConfig(radii=(0.1, 0.3))])
def test_runs_are_the_same_and_are_continued(pairs, name, sampling, tmp_path):
    few, more = (aj.data.select(IMAGES, max_images=count) for count in (3, 5))
    config = aj.RunConfig(theta=0.3, certify=aj.CertifyConfig(n0=20, n=500), sampling=sampling)
    for folder, classifier in zip(("torch", "jax"), pairs[name], strict=True):
        for images in (few, more):
            aj.certify_dataset(classifier, images, config, out=tmp_path / folder)
    hosted, native = (read_run(tmp_path / folder).columns("predictions", "counts", "n") for folder in ("torch", "jax"))
    np.testing.assert_array_equal(hosted["predictions"], native["predictions"])
    np.testing.assert_allclose(hosted["counts"], native["counts"], atol=2)
    other = Cnn()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    with pytest.raises(ValueError, match=r"other settings \(classifier is"):
        aj.certify_dataset(from_module(other, X), more, config, out=tmp_path / "torch")


def test_runs_on_several_devices(pairs, tmp_path):
    few = aj.data.select(IMAGES, max_images=3)
    config = aj.RunConfig(theta=0.3, certify=aj.CertifyConfig(n0=20, n=500))
    counts = []
    for number in (1, 3):
        execution = aj.Execution(devices=number)
        table = aj.certify_dataset(pairs["cnn"][0], few, config, out=tmp_path / str(number), execution=execution)
        counts.append(read_run(table.parent).columns("counts")["counts"])
    np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("function", ["make", "make_translated"])
def test_command_line(function, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    arguments = ["--max", "2", "--n", "200", "--n0", "20", "--out", str(tmp_path / "run")]
    command = ["certify", "--classifier", f"my_models:{function}", "--sigma", "0.3", "--method", "fixed", *arguments]
    cli.main(command)
    assert (tmp_path / "run" / "results.tsv").exists()


def test_searches_are_refused_in_pytorch_and_work_in_jax(pairs, tmp_path):
    hosted, native = pairs["transformer"]
    few = aj.data.select(IMAGES, max_images=2)
    config = aj.RunConfig(method="ancer", theta=0.3)
    with pytest.raises(ValueError, match=r"method ancer searches for theta by gradients.*fixed or universal"):
        aj.certify_dataset(hosted, few, config, out=tmp_path / "run")
    smoothed = aj.Smoothed(hosted, aj.Gaussian(), 0.3)
    with pytest.raises(ValueError, match="runs outside of JAX"):
        aj.optimize_isotropic(jax.random.key(0), smoothed, X)
    with pytest.raises(ValueError, match="runs outside of JAX"):
        jax.vmap(lambda key: aj.count_votes(key, smoothed, X, config=CONFIG, chunk=10))(
            jax.random.split(jax.random.key(0))
        )
    settings = aj.IsotropicConfig(steps=2, num_samples=8)
    theta, _ = aj.optimize_isotropic(jax.random.key(0), aj.Smoothed(native, aj.Gaussian(), 0.3), X, config=settings)
    assert np.isfinite(theta) and theta != 0.3


def test_the_module_is_left_alone_and_later_changes_are_not_noticed():
    module = Cnn().train()
    image = X.copy()
    classifier = from_module(module, image)
    before = np.asarray(classifier(X[None]))
    with torch.no_grad():
        module.head.bias += 1
    assert module.training and module.head.weight.requires_grad
    np.testing.assert_array_equal(classifier(X[None]), before)
    np.testing.assert_array_equal(image, X)


def test_translation_leaves_pytorch_as_it_was():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    translate(VisionTransformer(), X)(X[None])
    assert torch.backends.mha.get_fastpath_enabled() == before
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    with pytest.raises(AttributeError):
        torch.ops.aten.prod.no_such_name  # noqa: B018


SQUARE = np.full((2, 2, 2), 0.3, np.float32)


class Holder(torch.nn.Module):
    """Holds something beside its weights."""

    def __init__(self, held=None, buffer=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.held, self.head = held, torch.nn.Linear(8, 3)
        self.register_buffer("shift", torch.tensor(buffer), persistent=False)

    def forward(self, x):
        return self.head(x.flatten(1) + self.shift)


class Negative(Holder):
    def forward(self, x):
        return -super().forward(x)


LAMBDAS = [lambda x: x, lambda x: -x]


class Decorated(Holder):
    """Has attributes of all kinds."""

    scale: float = 1.0
    kinds = frozenset({"a", "b", "c"})

    @property
    def name(self):
        return "a" if self.held in {"x", "y"} else ...

    @functools.cached_property
    def twice(self):
        return 2 * self.scale

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def made(cls):
        return cls()

    def forward(self, x):
        return self.scale * super().forward(x)


def transformer(heads, **settings):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(4, heads, 8, batch_first=True, **settings)
    return torch.nn.Sequential(torch.nn.Flatten(2), layer, torch.nn.Flatten(), torch.nn.Linear(8, 3))


def digest(module, **settings):
    return from_module(module, SQUARE, **settings).apply.digest


def with_weight(change):
    module = Holder()
    with torch.no_grad():
        module.head.weight[0, 0] = torch.nextafter(module.head.weight[0, 0], torch.tensor(change))
    return module


def test_the_digest_says_what_a_module_computes():
    """All of these differ, and each is the same when it is made again."""
    made = [
        lambda: Holder(),
        lambda: Negative(),
        lambda: with_weight(1.0),
        lambda: Holder(buffer=0.1),
        lambda: Holder(0.1),
        lambda: Holder(0.2),
        lambda: Holder("0.1"),
        lambda: Holder(torch.tensor(0.1)),
        lambda: Holder(torch.tensor(0.1, dtype=torch.bfloat16)),
        lambda: Holder(np.float32([0.1])),
        lambda: Holder([torch.nn.ReLU(), 1]),
        lambda: Holder([torch.nn.GELU(), 1]),
        lambda: Holder({"a": (1, 2)}),
        lambda: Holder({"a": (2, 1)}),
        lambda: Holder({1, 2}),
        lambda: Holder(torch.relu),
        lambda: Holder(torch.nn.functional.relu),
        lambda: Holder(functools.partial(torch.nn.functional.gelu, approximate="tanh")),
        lambda: Holder(digest),
        lambda: Holder(torch.float16),
        lambda: transformer(2),
        lambda: transformer(4),
        lambda: transformer(2, activation="gelu"),
        lambda: transformer(2, norm_first=True),
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity()),
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(Holder().head)),
    ]
    found = [digest(make()) for make in made]
    assert [digest(make()) for make in made] == found
    assert [len(one) for one in found] == [64] * len(found)
    assert len({*found}) == len(found)
    assert digest(Holder(), channels="last") != found[0]
    assert digest(Holder(LAMBDAS[0])) != digest(Holder(LAMBDAS[1]))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert digest(Holder()) != found[0]
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_digest_knows_what_was_changed_in_a_class(monkeypatch):
    before = digest(Negative())
    monkeypatch.setattr(Holder, "scale", 2.0, raising=False)
    scaled = digest(Negative())
    monkeypatch.setattr(Holder, "forward", lambda self, x: 2 * self.head(x.flatten(1)))
    assert len({before, scaled, digest(Negative())}) == 3
    monkeypatch.setattr(Holder, "power", functools.partialmethod(pow, 2), raising=False)
    assert digest(Negative()) == ""  # its arguments would have to be described, too


def test_the_digest_of_a_class_with_all_kinds_of_attributes():
    assert len(digest(Decorated())) == 64 and digest(Decorated()) == digest(Decorated())


def test_the_digest_knows_the_precision_of_products_in_either_way_of_setting_it():
    """In a process of its own: PyTorch refuses to mix both ways."""
    code = (
        "import numpy as np, torch\n"
        "from ancer_jax.torch import from_module\n"
        "module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3))\n"
        "digest = lambda: from_module(module, np.full((2, 2, 2), 0.3, np.float32)).apply.digest\n"
        "found = [digest()]\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "found.append(digest())\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "found.append(digest())\n"
        "assert len({*found}) == 3 and digest() == found[-1]\n"
    )
    if hasattr(torch.backends, "fp32_precision"):
        subprocess.run([sys.executable, "-c", code], check=True)


def closed_over():
    factor = 2

    class Closed(torch.nn.Module):
        def forward(self, x):
            return factor * x.flatten(1)

    return Closed()


def of_a_shell():
    names = {"torch": torch}
    exec("class Net(torch.nn.Module):\n    def forward(self, x): return x.flatten(1)", names)
    names["Net"].__module__ = "__main__"
    return names["Net"]()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    "make", [lambda: Holder(object()), closed_over, of_a_shell, lambda: torch.jit.script(Holder())]
)
def test_what_has_no_hash_has_no_digest(make):
    assert digest(make()) == ""


def test_channels_and_inputs_that_are_no_images():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 24
    assert from_module(torch.nn.Flatten(), x).num_classes == 24
    first, last = (np.asarray(from_module(torch.nn.Flatten(), x, channels=c)(x[None]))[0] for c in ("first", "last"))
    np.testing.assert_array_equal(first, np.moveaxis(x, -1, 0).ravel())
    np.testing.assert_array_equal(last, x.ravel())
    rows = np.linspace(0, 1, 5, dtype=np.float32)
    for make in from_module, translate:
        classifier = make(torch.nn.Linear(5, 3), rows)
        smoothed = aj.Smoothed(classifier, aj.Gaussian(), 0.1)
        assert aj.certify(jax.random.key(0), smoothed, rows, config=CONFIG).prediction in (-1, 0, 1, 2)


@pytest.mark.parametrize("make", [from_module, translate])
def test_what_is_refused(make):
    with pytest.raises((ValueError, TypeError), match=r"torch.nn.*Module"):  # types are checked in tests
        make(lambda x: x, X)
    with pytest.raises(ValueError, match=r"does not work on an input of shape \[28, 28\]: ValueError"):
        make(Cnn(), X[..., 0])
    with pytest.raises(ValueError, match="cannot be copied"):
        make(Holder(threading.Lock()), SQUARE)
    with pytest.raises(ValueError, match=r"must return logits \[n, K\], got shape \[1, 1, 28, 28\]"):
        make(torch.nn.Identity(), X)
    with pytest.raises((ValueError, TypeError), match="channels"):
        make(Cnn(), X, channels="middle")
    with pytest.raises(ValueError, match="num_classes"):
        make(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1)), X)

    class Noisy(torch.nn.Linear):
        def forward(self, x):
            x = x.flatten(1)
            return super().forward(x + torch.rand_like(x))

    with pytest.raises(ValueError, match=r"depend on a row's place|differ by up to"):
        make(Noisy(784, 10), X)


def test_what_cannot_be_translated():
    with pytest.raises(ValueError, match=r"(?s)cannot translate this Looking \(from_module certifies it without"):
        translate(Looking(), X)
    assert from_module(Looking(), X).num_classes == 10
