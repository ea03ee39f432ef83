import pytest
from damaged_shards import run


@pytest.mark.parametrize(
    "shards", [50, pytest.param(1000, marks=pytest.mark.nightly)], ids=["short", "long"]
)
def test_the_losses_of_damaged_shards_are_counted_exactly(shards):
    assert sum(run(shards, seed=1).values()) == shards
