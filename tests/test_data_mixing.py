"""Mixing: kinds agree between processes, each row once, the same again after a resume, epochs of equal
length.
"""

import copy
from itertools import islice

import datasets
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from data_fixtures import image_text_rows, region_rows, tiny_processor
from torch.utils.data import DataLoader

from hf_vlp.data.collators import ImageTextCollator, RegionCollator
from hf_vlp.data.mixing import MixedBatchSampler, MixedCollator, MixedDataset, MixedStream


def numbered(count, name="n"):
    return datasets.Dataset.from_list([{name: i} for i in range(count)])


def mixed(images=64, regions=30):
    return MixedDataset(image=numbered(images), region=numbered(regions))


def kinds(batches):
    assert all(len({kind for kind, *_ in batch}) == 1 for batch in batches)
    return [batch[0][0] for batch in batches]


def test_image_follows_each_region_and_half_the_iterations_have_one():
    sampler = MixedBatchSampler(mixed(), batch_size=4, region_batch_size=3)
    batches = list(sampler)
    order = kinds(batches)
    assert len(sampler) == len(batches) == 16 + 8
    assert order.count("image") == 16 and order.count("region") == 8
    assert "region region" not in " ".join(order) and order[-1] == "image"
    assert {len(batch) for batch in batches if batch[0][0] == "region"} == {3}
    images = [index for batch in batches for kind, index, _ in batch if kind == "image"]
    assert sorted(images) == list(range(64)) and images != sorted(images)


def test_order_of_kinds_varies_with_epoch_and_seed_but_not_with_the_run():
    def order(seed, epoch):
        sampler = MixedBatchSampler(mixed(), batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert kinds(order(1, 0)) != kinds(order(1, 1))
    assert kinds(order(1, 0)) != kinds(order(2, 0))
    assert order(1, 0)[0] != order(1, 1)[0]


def test_global_generators_play_no_part():
    sampler = MixedBatchSampler(mixed(), batch_size=4)
    torch.manual_seed(0)
    one, state = list(sampler), torch.get_rng_state()
    torch.manual_seed(1)
    assert list(sampler) == one
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world, even", [(2, True), (2, False), (3, True), (4, False)])
def test_processes_agree_on_the_kind_and_share_the_rows(world, even):
    sampler = MixedBatchSampler(mixed(), batch_size=2, region_batch_size=3, run_length=world)
    ranks = [list(BatchSamplerShard(sampler, world, rank, even_batches=even)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) * world == len(sampler)
    for step in zip(*ranks, strict=True):
        assert len(set(kinds(step))) == 1
        assert len({batch[0][2] for batch in step}) == world  # each process draws its own augmentation
    images = [index for rank in ranks for batch in rank for kind, index, _ in batch if kind == "image"]
    assert len(images) == len(set(images)) == 64 // (2 * world) * 2 * world


def test_regions_go_on_from_epoch_to_epoch():
    """Twelve epochs of eight draws each from 30 rows: every pass over the regions holds each of them once."""
    sampler = MixedBatchSampler(mixed(images=16), batch_size=4, region_probability=0.5, seed=3)
    drawn = []
    for epoch in range(15):
        sampler.set_epoch(epoch)
        drawn += [index for batch in sampler for kind, index, _ in batch if kind == "region"]
    assert len(drawn) == 15 * 8
    for start in range(0, 120, 30):
        assert sorted(drawn[start : start + 30]) == list(range(30))


def test_every_epoch_has_the_same_length():
    sampler = MixedBatchSampler(mixed(), batch_size=4, region_probability=0.3)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 16 + 5


@pytest.mark.parametrize("probability, regions", [(0.0, 0), (1.0, 16)])
def test_limits_of_the_probability(probability, regions):
    order = kinds(list(MixedBatchSampler(mixed(), batch_size=4, region_probability=probability)))
    assert order.count("region") == regions and order.count("image") == 16


def test_one_dataset_only():
    batches = list(MixedBatchSampler(MixedDataset(image=numbered(10)), batch_size=3))
    assert kinds(batches) == ["image"] * 3


def test_rows_carry_kind_and_seed():
    dataset = mixed()
    assert dataset[("region", 5, 99)] == {"n": 5, "kind": "region", "sample_seed": 99}
    assert len(dataset) == 94


def collate(rows):
    return {
        "n": torch.tensor([row["n"] for row in rows]),
        "seed": torch.tensor([row["sample_seed"] for row in rows]),
    }


def loader(world=1, rank=0, workers=0):
    dataset = mixed()
    sampler = MixedBatchSampler(dataset, batch_size=2, region_batch_size=3, run_length=world)
    plain = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    return prepare_data_loader(plain, num_processes=world, process_index=rank)


def batches_of_epoch(prepared, epoch):
    """As the Trainer does it."""
    prepared.set_epoch(epoch)
    return [(batch["n"].tolist(), batch["seed"].tolist()) for batch in prepared]


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_any_epoch_is_exact(world, rank, workers):
    undisturbed = loader(world, rank)
    epochs = [batches_of_epoch(undisturbed, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(undisturbed) == len(epochs[0])
    for epoch in range(3):
        resumed = skip_first_batches(loader(world, rank, workers), 7)
        assert batches_of_epoch(resumed, epoch) == epochs[epoch][7:]


def test_resumed_batches_are_equal_to_the_last_pixel():
    """Rows to tensors: augmentation and masks come again though the global generator stands elsewhere."""
    processor = tiny_processor()
    collator = MixedCollator(ImageTextCollator(processor=processor), RegionCollator(processor=processor))
    dataset = MixedDataset(image=image_text_rows(12), region=region_rows(6))
    plain = DataLoader(dataset, batch_sampler=MixedBatchSampler(dataset, batch_size=2), collate_fn=collator)
    whole = list(prepare_data_loader(plain))
    torch.manual_seed(123)
    resumed = list(skip_first_batches(prepare_data_loader(copy.deepcopy(plain)), 4))
    assert len(resumed) == len(whole) - 4
    for one, two in zip(whole[4:], resumed, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert {"target_boxes" in batch for batch in whole} == {True, False}


def collate_kinds(rows):
    (kind,) = {row["kind"] for row in rows}
    return {"kind": kind, "n": [row["n"] for row in rows], "seed": [row["sample_seed"] for row in rows]}


def stream(count, shards=1):
    return numbered(count).to_iterable_dataset(num_shards=shards)


def stream_loader(world=1, rank=0, workers=0, images=60, regions=10, shards=1, skip=0):
    mixed_stream = MixedStream(
        stream(images, shards), stream(regions, shards), batch_size=3, run_length=world
    )
    plain = DataLoader(mixed_stream, batch_size=3, collate_fn=collate_kinds, num_workers=workers)
    prepared = prepare_data_loader(plain, num_processes=world, process_index=rank, dispatch_batches=False)
    return skip_first_batches(prepared, skip) if skip else prepared


@pytest.mark.parametrize("workers, shards", [(0, 1), (2, 2), (2, 4)])
def test_stream_batches_are_of_one_kind_in_all_processes(workers, shards):
    ranks = [take(30, stream_loader(2, rank, workers, shards=shards)) for rank in range(2)]
    assert [batch["kind"] for batch in ranks[0]] == [batch["kind"] for batch in ranks[1]]
    assert {batch["kind"] for batch in ranks[0]} == {"image", "region"}
    images = [
        n
        for step in zip(*ranks, strict=True)
        for batch in step
        if batch["kind"] == "image"
        for n in batch["n"]
    ]
    assert len(images) > 60 and sorted(images[:60]) == list(
        range(60)
    )  # a whole pass before any row comes again
    seeds = [batch["seed"][0] for rank in ranks for batch in rank]
    assert len(set(seeds)) == len(seeds)


def test_stream_repeats_and_resumes():
    one = take(40, stream_loader())
    assert one == take(40, stream_loader()) and take(35, stream_loader(skip=5)) == one[5:]
    assert sum(batch["kind"] == "image" for batch in one) > 20


def test_stream_shuffles_each_pass_anew():
    shuffled = MixedStream(stream(6).shuffle(seed=0, buffer_size=6), batch_size=3)
    order = [row["n"] for row in islice(shuffled, 12)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]


def test_stream_of_one_kind():
    rows = take(9, MixedStream(stream(7), batch_size=3))
    assert [row["n"] for row in rows] == [*range(7), 0, 1] and {row["kind"] for row in rows} == {"image"}


def test_empty_stream():
    for image, region in ((stream(3), nothing()), (nothing(), stream(3))):
        with pytest.raises(ValueError, match="stream has no rows for this DataLoader worker"):
            take(9, MixedStream(image, region, batch_size=3, region_probability=1.0))


def nothing():
    return stream(3).filter(lambda row: False)


def take(number, rows):
    return list(islice(rows, number))


def test_mixed_collator_dispatches_and_refuses_mixtures():
    collator = MixedCollator(image=lambda rows: "image batch", region=lambda rows: "region batch")
    assert collator([{"kind": "region"}] * 2) == "region batch"
    with pytest.raises(ValueError, match="mixes rows of the kinds"):
        collator([{"kind": "region"}, {"kind": "image"}])


def test_bad_arguments():
    with pytest.raises(ValueError, match="image dataset has 5 rows"):
        MixedBatchSampler(mixed(images=5), batch_size=3, run_length=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        MixedBatchSampler(mixed(), batch_size=0)
    with pytest.raises(ValueError, match="region_probability is 1.5"):
        MixedBatchSampler(mixed(), batch_size=2, region_probability=1.5)
    with pytest.raises(ValueError, match="region holds no rows"):
        MixedDataset(image=numbered(3), region=[])
    with pytest.raises(ValueError, match="region_probability is -1"):
        MixedStream(stream(3), region_probability=-1)
