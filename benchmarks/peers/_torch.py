"""A worker of peers.py that runs the reference packages: one task a line, as JSON, and one answer a line.

These are ancer-python, ddsmoothing-python and adversarial-robustness-toolbox, as released, in an environment of their
own. Their networks have the device 'cuda' in their source, which is replaced.
"""

import json
import pathlib
import re
import sys
import time
import types

import numpy as np
import scipy.stats
import torch

if not hasattr(scipy.stats, "binom_test"):  # gone since SciPy 1.12; certification does not use it
    setattr(scipy.stats, "binom_test", None)  # noqa: B010
import ddsmoothing.utils  # pyright: ignore[reportMissingImports]
from ancer.optimization import optimize_ancer  # pyright: ignore[reportMissingImports]
from ddsmoothing.certificate import L1Certificate, L2Certificate  # pyright: ignore[reportMissingImports]
from ddsmoothing.optimization import optimize_isotropic_dds  # pyright: ignore[reportMissingImports]
from ddsmoothing.smooth import Smooth  # pyright: ignore[reportMissingImports]

FOLDER = pathlib.Path(ddsmoothing.utils.__file__).parent
DEVICE = sys.argv[1]
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True  # as XLA does: the fastest algorithm for each shape


def build(name):
    file = {"ancer_resnet18": "resnet", "wrn_40_2": "wideresnet"}[name]
    module = types.ModuleType(file)
    exec((FOLDER / f"{file}.py").read_text().replace("'cuda'", f"'{DEVICE}'"), module.__dict__)
    if name == "ancer_resnet18":
        return module.resnet18(num_classes=10).to(DEVICE)
    return module.WideResNet(depth=40, num_classes=10, widen_factor=2).to(DEVICE)


class Probabilities(torch.nn.Module):
    """A network that returns probabilities. The WideResNet returns logits, whose mean the searches would take."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).softmax(1)


class Counting(Smooth):
    """A smoothed classifier that keeps its votes."""

    votes: list[list[int]]

    def _sample_noise(self, *arguments, **options):
        found = super()._sample_noise(*arguments, **options)
        self.votes = [*getattr(self, "votes", []), [int(count) for count in found]]
        return found


class Worker:
    """Does the tasks; `load` or `train` comes first."""

    def train(self, network, data, noise, scale, epochs, seed, out):
        torch.manual_seed(seed)
        found, data = build(network), np.load(data)
        images, labels = (torch.from_numpy(data[name]) for name in ("images", "labels"))
        steps, batch = epochs * (len(images) // 128), 128
        optimizer = torch.optim.SGD(found.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch):
                if len(rows) < batch:
                    continue
                x, y = images[rows].to(DEVICE).float() / 255, labels[rows].to(DEVICE)
                eps = torch.randn_like(x) if noise == "l2" else 2 * torch.rand_like(x) - 1
                p = found(x + scale * eps)
                log_p = p.clamp_min(1e-7).log() if network == "ancer_resnet18" else p.log_softmax(1)
                loss = torch.nn.functional.nll_loss(log_p, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        np.savez(out, **{name: tensor.cpu().numpy() for name, tensor in found.state_dict().items()})

    def load(self, network, weights, images, norm):
        self.network, self.norm = build(network), norm
        stored = np.load(weights)
        self.network.load_state_dict({name: torch.from_numpy(stored[name]) for name in stored})
        self.network.eval()
        if network == "wrn_40_2":
            self.network = Probabilities(self.network)
        self.images = torch.from_numpy(np.load(images)).to(DEVICE)
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": DEVICE}

    def certify(self, rows, theta, n0, n, alpha, batch, seed):
        torch.manual_seed(seed)
        law = L2Certificate(1, DEVICE) if self.norm == "l2" else L1Certificate(DEVICE)
        theta = np.broadcast_to(np.load(theta) if isinstance(theta, str) else theta, self.images[rows].shape)
        found = {"classes": [], "gaps": [], "selected": [], "votes": []}
        for x, one in zip(self.images[rows], theta, strict=True):
            smooth = Counting(self.network, 10, torch.from_numpy(np.array(one, np.float32)).to(DEVICE), law)
            label, gap = smooth.certify(x, n0, n, alpha, batch, DEVICE)
            selection, estimation = smooth.votes
            answer = (int(label), float(gap), int(np.argmax(selection)), estimation)
            for name, value in zip(found, answer, strict=True):
                found[name].append(value)
        return found

    def isotropic(self, rows, start, steps, samples, lr, seed, out):
        torch.manual_seed(seed)
        law = L2Certificate(len(rows), DEVICE) if self.norm == "l2" else L1Certificate(DEVICE)
        start = torch.full((len(rows),), start, device=DEVICE)
        theta = optimize_isotropic_dds(self.network, self.images[rows], law, lr, start, steps, samples, DEVICE)
        np.save(out, theta.detach().cpu().numpy())

    def anisotropic(self, rows, start, steps, samples, lr, seed, out, frozen):
        torch.manual_seed(seed)
        for parameter in self.network.parameters():
            parameter.requires_grad_(not frozen)
        law = L2Certificate(len(rows), DEVICE) if self.norm == "l2" else L1Certificate(DEVICE)
        start = torch.from_numpy(np.load(start)).to(DEVICE).reshape(-1, 1, 1, 1).expand(self.images[rows].shape)
        start = start.contiguous()
        theta = optimize_ancer(self.network, self.images[rows], law, lr, start, steps, samples, 2.0, DEVICE)
        np.save(out, theta.detach().cpu().numpy())

    def art(self, rows, theta, n0, n, alpha, batch, seed):
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing  # pyright: ignore[reportMissingImports]

        np.random.seed(seed)  # noqa: NPY002
        smooth = PyTorchRandomizedSmoothing(
            self.network, torch.nn.CrossEntropyLoss(), (3, 32, 32), 10, sample_size=n0, scale=theta, alpha=alpha,
            device_type="gpu" if DEVICE == "cuda" else "cpu",
        )  # fmt: skip
        classes, radii = smooth.certify(self.images[rows].cpu().numpy(), n, batch)
        return {"classes": classes.tolist(), "radii": radii.tolist()}

    def memory(self):
        peak = re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss has the parent's
        return {"mib": int(peak[1]) / 1024 if peak else None}


worker, answers = Worker(), sys.stdout
sys.stdout = sys.stderr  # the packages print; only answers go to the standard output
for line in sys.stdin:
    task = json.loads(line)
    began = time.perf_counter()
    answer = getattr(worker, task.pop("do"))(**task) or {}
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"seconds": time.perf_counter() - began} | answer), file=answers, flush=True)
