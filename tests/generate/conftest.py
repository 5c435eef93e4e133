"""Models that the tests of generation share."""

import pytest

from tests.generate.models import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoints and exports by name."""
    return Made(tmp_path_factory.mktemp("generate"))
