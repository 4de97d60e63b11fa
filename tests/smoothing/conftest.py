import jaxtyping
import pytest


@pytest.fixture
def without_type_checker():
    """As for users, who have no beartype between them and the package: the package's own checks answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
