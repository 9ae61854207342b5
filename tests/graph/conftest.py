import pytest


@pytest.fixture(autouse=True)
def _usual_promotion(usual_promotion):
    """In every test of this folder."""
