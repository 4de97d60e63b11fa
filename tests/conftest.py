"""Types are checked while the tests run: jaxtyping's shapes through beartype."""

import os

# Eight virtual devices, so that tests can compare one device with several.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # tests leave the user's own alone

import jax
import jax.monitoring
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

jaxtyping.install_import_hook("ancer_jax", "beartype.beartype")

collect_ignore = ["torch_networks.py"]  # imports torch, which `make test` does not install

# How fast examples come says how busy the machine is, not whether the code is right.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


def pytest_collection_modifyitems(items):
    """Modules that want programs compiled in the same way come together: so each process changes it once."""
    items.sort(key=lambda item: "quick_compilation" not in _fixtures(item.getparent(pytest.Module)))


def _fixtures(module):
    return {name for mark in module.iter_markers("usefixtures") for name in mark.args}


def compile_quickly(quick: bool) -> None:
    """Nothing that was compiled one way is used with what is compiled the other way: last bits may differ."""
    if compiled_quickly[-1] != quick:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)
        compiled_quickly.append(quick)


compiled_quickly = [False]


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
    """Programs are kept from module to module, as long as these want them compiled in the same way."""
    compile_quickly("quick_compilation" in _fixtures(request.node))


@pytest.fixture(scope="module")
def quick_compilation(compilation):
    """For tests of the plumbing: programs are compiled in half the time, and run slower."""
    compile_quickly(True)


_compiled = []


@jax.monitoring.register_event_duration_secs_listener
def _note_compilation(event, seconds, **kinds):
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(seconds)


@pytest.fixture
def compilations():
    """How many programs have been compiled so far."""
    return lambda: len(_compiled)


@pytest.fixture
def without_type_checker():
    """As for users, who have no beartype between them and the package: the package's own checks answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_on_accelerators(monkeypatch):
    """CPU devices may wait for each other, as those of an accelerator may."""
    monkeypatch.setattr("ancer_jax.devices.refuse_collectives", lambda mesh, what: None)


def pytest_sessionfinish(session):
    """With NO_SKIPS=1, a test that is skipped is one that failed: what it needs should have been installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
