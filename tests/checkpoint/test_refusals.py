"""Weights of another model are never taken over in part, and no rank is left waiting."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch

pytestmark = [pytest.mark.world_size(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("refusals_worker.py")
    return launch(worker, ranks=2, timeout_s=120, folder=tmp_path_factory.mktemp("refusals"))


def answer(results: dict[str, Any], case: str) -> str:
    """What all ranks were told alike."""
    (told,) = set(results[case])
    return told


@pytest.mark.parametrize("case", ["same", "text only", "from text only", "its tower", "afterwards"])
def test_whole_parts_that_fit_are_taken_over(results: dict[str, Any], case: str):
    assert answer(results, case) == "accepted"


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (
            "fewer layers",
            "does not fit this model: model.llm.num_layers is 4 in the checkpoint and 2 here. Set "
            "model.llm.num_layers=4, or leave out checkpoint.weights.",
        ),
        ("more layers", "model.llm.num_layers is 4 in the checkpoint and 6 here. Set model.llm."),
        ("no bias", "model.llm.qkv_bias is true in the checkpoint and false here."),
        ("two fields", "model.llm.rope_base is 10000.0 in the checkpoint and 500.0 here."),
        ("two fields", "model.vision.feature_layer is -1 in the checkpoint and -2 here."),
        ("larger pictures", "position_embedding.weight has shape [16, 32] in the checkpoint and "),
        ("no such part", "the weights of resampler are wanted, but the checkpoint has only llm,"),
        ("tower from text only", "the weights of vision are wanted, but the checkpoint has only"),
    ],
)
def test_other_models_are_refused_with_the_reason(results: dict[str, Any], case: str, says: str):
    assert says in answer(results, case)


def test_parameters_that_the_model_lacks_on_all_ranks_are_refused(results: dict[str, Any]):
    told = answer(results, "by name")
    # Seven a layer; layers 2 and 3 are too many.
    assert "holds decoder.layers.2." in told
    assert " and 13 more, which this model lacks" in told


def test_a_refused_checkpoint_changed_no_weight(results: dict[str, Any]):
    assert results["unchanged"]


@pytest.mark.parametrize("case", ["nothing", "nothing, weights"])
def test_a_folder_that_one_rank_does_not_see_is_refused_on_all(results: dict[str, Any], case: str):
    assert answer(results, case).endswith("nothing is not a directory, so it is not a checkpoint")


@pytest.mark.parametrize("case", ["older", "older, weights"])
def test_ranks_that_see_different_manifests_refuse(results: dict[str, Any], case: str):
    for told in results[case]:
        assert "is not the same checkpoint on all ranks: [1] see another manifest" in told


@pytest.mark.parametrize("case", ["read", "read for weights", "random_state"])
def test_a_file_that_one_rank_cannot_read_stops_all(results: dict[str, Any], case: str):
    assert answer(results, case) == "this file went away"
