"""Two processes, started by torchrun: gradients of one process on the joint batch, and training in step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from distributed_run import build, dictionary_cells, gradients, joint_batches
from packaging import version
from safetensors.torch import load_file
from tiny import retrieval_batch, tiny_soho_config

from hf_vlp.models.modeling_soho import VisualDictionary

TESTS = Path(__file__).parent
# transformers 5.17 cannot resume several processes on CPUs
CAN_RESUME = version.parse(transformers.__version__) >= version.parse("5.18")


def on_two_processes(output_dir: Path, *arguments: str) -> Path:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(TESTS / "distributed_run.py"), str(output_dir), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return output_dir


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> Path:
    return on_two_processes(tmp_path_factory.mktemp("gradients"), "gradients")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return on_two_processes(tmp_path_factory.mktemp("train"), "train", *["--resume"] * CAN_RESUME)


def of_one(name: str) -> dict[str, torch.Tensor]:
    """Gradients of one process on the joint batch, on one thread like each of the two, so that sums are
    alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, batch = build(name)
    model(**batch).loss.backward()
    torch.set_num_threads(threads)
    return gradients(model)


@pytest.mark.parametrize("name", [name for name in joint_batches() if not name.endswith("official")])
def test_gradients_are_those_of_the_joint_batch(of_two, name):
    expected, found = of_one(name), load_file(of_two / f"{name}.safetensors")
    assert {key for key, value in found.items() if value.any()} == {k for k, v in expected.items() if v.any()}
    for key, value in expected.items():
        if value.any():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-4)


def test_official_gradients_are_halved_on_the_encoders_only(of_two):
    expected, found = of_one("itc_official"), load_file(of_two / "itc_official.safetensors")
    assert expected["model.temperature"].any()
    for key, value in expected.items():
        factor = 1.0 if key == "model.temperature" else 0.5
        torch.testing.assert_close(found[key], factor * value, atol=1e-6, rtol=1e-4)


def read_reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("data", ["records", "stream"])
def test_processes_see_one_kind_and_different_rows(trained, data):
    first, second = (report[data] for report in read_reports(trained))
    assert len(first) == len(second) == 6
    kinds = ["loss_bbox" in record for record in first]
    assert kinds == ["loss_bbox" in record for record in second] and any(kinds) and not all(kinds)
    assert all(a["pixels"] != b["pixels"] for a, b in zip(first, second, strict=True))


def test_logged_terms_are_means_over_processes(trained):
    reports = read_reports(trained)
    steps = [entry for entry in reports[0]["log"] if "loss" in entry]
    for step, first, second in zip(steps, *(report["records"] for report in reports), strict=True):
        for name in first:
            if name.startswith("loss_"):
                assert step[name] == pytest.approx((first[name] + second[name]) / 2, abs=2e-4)
    for name in ("eval_loss", "eval_loss_itc", "eval_loss_itm", "eval_loss_mlm"):
        assert reports[0]["evaluation"][name] == pytest.approx(reports[1]["evaluation"][name])


def test_processes_end_with_equal_weights(trained):
    first, second = (load_file(trained / f"weights{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not CAN_RESUME, reason="needs transformers 5.18 or later")
def test_two_processes_resume(trained):
    """With gradient checkpointing in the second part, which must not change anything."""
    for rank in range(2):
        straight, resumed = (
            load_file(trained / f"{name}{rank}.safetensors") for name in ("weights", "resumed")
        )
        for name, value in straight.items():
            torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=1e-5)


def test_teacher_and_queue_are_those_of_all_processes(tmp_path):
    """Equal without being sent around: every process writes the features of all, in order of rank."""
    on_two_processes(tmp_path, "teacher")
    first, second = (load_file(tmp_path / f"teacher{rank}.safetensors") for rank in range(2))
    sent, written = "queue.image_features", 16 % 10
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == [sent]
    assert (first[sent][0] == 0).all() and (second[sent][0] == 1).all()  # written by hand, never broadcast
    assert torch.equal(first[sent][1:], second[sent][1:])
    assert first["queue.pointer"] == written
    ids = retrieval_batch()["image_ids"]
    assert torch.equal(first["queue.image_ids"], ids.repeat(4)[-10:].roll(written))


def test_self_critical_gradients_are_those_of_all_processes(tmp_path):
    """Processes draw different captions, and yet end with equal weights."""
    on_two_processes(tmp_path, "captions")
    drawn = [json.loads((tmp_path / f"captions{rank}.json").read_text()) for rank in range(2)]
    assert [len(captions) for captions in drawn[0]] == [2, 6] * 2  # greedy captions, then samples
    assert all(first != second for first, second in zip(*(one[1::2] for one in drawn), strict=True))
    first, second, before = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("captions0", "captions1", "before0")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], before[name]) for name in first)


def test_dictionary_is_that_of_all_processes(tmp_path):
    on_two_processes(tmp_path, "dictionary")
    alone = VisualDictionary(tiny_soho_config()).train()
    alone.reset()
    for cells in dictionary_cells():
        alone(cells, copies=2)
    first, second = (load_file(tmp_path / f"dictionary{rank}.safetensors") for rank in range(2))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)
    assert alone.usage.sum() == 3 * 2 * 7 * 2

    first, second = (load_file(tmp_path / f"revived{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    distances = torch.cdist(first["embeddings"], dictionary_cells().flatten(0, 2)).min(dim=1)
    revived = first["ema_count"] == 1
    assert (distances.values[revived] < 1e-2).all()
    assert set((distances.indices[revived] % 14 // 7).tolist()) == {0, 1}  # cells of both processes
