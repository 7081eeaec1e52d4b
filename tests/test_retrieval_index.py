"""The index: what it finds, what it re-ranks, what stays on disk when something stops it."""

import pytest
import torch
from data_fixtures import picture
from heads import make_head
from hub_server import run_client
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import loud

import hf_vlp
import hf_vlp.retrieval_index.index as index_module
import hf_vlp.retrieval_index.pieces as pieces_module
from hf_vlp import RetrievalIndex
from hf_vlp.evaluation import evaluate_retrieval
from hf_vlp.images import BadImageError
from hf_vlp.retrieval_index.nearest import FaissSearch, nearest
from hf_vlp.retrieval_index.pieces import Pieces

IMAGES = [picture(i, 60 + i, 50) for i in range(7)]
TEXTS = ["a red circle", "left of the blue square", "is the green cross right"]
HEADS = [hf_vlp.XVLMForRetrieval, hf_vlp.ALBEFForRetrieval]


def parts(head=hf_vlp.XVLMForRetrieval):
    return loud(head), make_head(head)[1]


def filled(folder=None, head=hf_vlp.XVLMForRetrieval, **options) -> RetrievalIndex:
    index = RetrievalIndex(*parts(head), folder, **options)
    index.add(IMAGES, ids=range(len(IMAGES)))
    return index


# Search

numbers = st.integers(-3, 3)  # whose products are exact, so that ties are ties


@st.composite
def galleries(draw):
    width = draw(st.integers(1, 4))
    rows = st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=12)
    return torch.tensor(draw(rows)).float(), torch.tensor(draw(rows)).float()


@given(galleries(), st.integers(1, 15))
def test_exact_search_is_a_stable_sort_of_all(gallery, k):
    features, queries = gallery
    places, scores = nearest(features, queries, k)
    for query, of_query, found in zip(queries, places, scores, strict=True):
        expected = features @ query
        best = expected.argsort(descending=True, stable=True)[:k]
        assert of_query == best.tolist() and found == expected[best].tolist()


@given(galleries(), st.integers(1, 15))
def test_faiss_finds_what_torch_finds(gallery, k):
    features, queries = gallery
    exact, faiss = nearest(features, queries, k), FaissSearch(features, "Flat")(queries, k)
    assert faiss[1] == exact[1], "cosines; of equal ones FAISS may take another"
    for query, places, scores in zip(queries, *faiss, strict=True):
        assert len(set(places)) == len(places) == min(k, len(features))
        assert (features[places] @ query).tolist() == scores


@settings(max_examples=25, deadline=None)
@given(galleries(), st.lists(st.integers(1, 5), max_size=8))
def test_pieces_make_no_difference(tmp_path_factory, gallery, cuts):
    features, _ = gallery
    states = torch.randn(len(features), 2, 3).half()
    ids = [f"image {i}" for i in range(len(features))]
    pieces, start = Pieces(tmp_path_factory.mktemp("pieces")), 0
    for size in [*cuts, len(features)]:
        if rows := ids[start : start + size]:
            stop = start + len(rows)
            pieces.write(rows, features[start:stop], states[start:stop])
            start = stop
    copied = tmp_path_factory.mktemp("copy")
    pieces.copy_to(copied)
    for stored in (pieces, Pieces(pieces.folder), Pieces(copied)):
        assert stored.ids == ids and torch.equal(stored.features(), features)
        places = list(range(len(ids)))[::-1]
        assert torch.equal(stored.states(places), states[places])
    assert len(list(copied.iterdir())) == 1


@pytest.mark.parametrize("head", HEADS)
def test_candidates_are_the_nearest_by_cosine(head):
    index = filled(head=head)
    (rows,) = index.search(text=TEXTS[:1], k=7, rerank=0)
    expected = hf_vlp.predict("retrieval", index.model, index.processor, IMAGES, TEXTS[:1])
    expected = sorted(expected, key=lambda row: -row["cosine"])
    assert [row["id"] for row in rows] == [str(row["image"]) for row in expected]
    assert [row["cosine"] for row in rows] == pytest.approx([row["cosine"] for row in expected], abs=1e-5)
    assert index.search(text=TEXTS[0], k=2, rerank=0) == rows[:2]


def test_an_image_finds_itself_first():
    index = filled(states=None)
    for i, image in enumerate(IMAGES):
        rows = index.search(image=image, k=3)
        assert rows[0]["id"] == str(i) and rows[0]["cosine"] == pytest.approx(1, abs=1e-5)
        assert len(rows) == 3 and rows[0].keys() == {"id", "cosine"}
    together = index.search(image=IMAGES, k=3)
    assert [[row["id"] for row in rows] for rows in together] == [
        [row["id"] for row in index.search(image=image, k=3)] for image in IMAGES
    ]


@pytest.mark.parametrize("faiss", ["Flat", "HNSW8"])
def test_search_with_faiss(faiss, tmp_path):
    exact = filled(tmp_path / "index")
    other = RetrievalIndex.load(tmp_path / "index", exact.model, exact.processor, faiss=faiss)
    for options in ({"text": TEXTS}, {"image": IMAGES}, {"text": TEXTS, "rerank": 0}):
        for one, two in zip(exact.search(**options), other.search(**options), strict=True):
            assert [row["id"] for row in one] == [row["id"] for row in two]
            for name in one[0]:
                expected = [row[name] for row in one]
                assert [row[name] for row in two] == (
                    expected if name == "id" else pytest.approx(expected, abs=1e-5)
                )
    with pytest.raises(ValueError, match="faiss is 'nonsense'"):
        RetrievalIndex.load(tmp_path / "index", exact.model, exact.processor, faiss="nonsense").search(
            TEXTS[0]
        )


# Re-ranking


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("states", "dtype", "tolerance"),
    [("key_values", "float32", 1e-5), ("embeds", "float32", 1e-5), ("key_values", "float16", 2e-2)],
)
@pytest.mark.parametrize("rerank", [3, 7])
def test_scores_are_those_of_the_evaluation(head, states, dtype, tolerance, rerank):
    index = filled(head=head, states=states, dtype=dtype)
    rows = [{"image": image, "caption": [TEXTS[i % 3]]} for i, image in enumerate(IMAGES)]
    expected = evaluate_retrieval(index.model, index.processor, rows, top_k=rerank).text_to_image
    assert expected[expected > -100].std() > 0.05, "scores differ"
    for scores, found in zip(expected[:3], index.search(text=TEXTS, k=rerank, rerank=rerank), strict=True):
        assert {int(row["id"]) for row in found} == set((scores > -100).nonzero()[:, 0].tolist())
        for row in found:
            assert row["score"] == pytest.approx(scores[int(row["id"])].item(), abs=tolerance, rel=tolerance)
        assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)


def test_the_re_ranked_come_first():
    index = filled()
    plain = index.search(text=TEXTS[0], k=7, rerank=0)
    found = index.search(text=TEXTS[0], k=7, rerank=3)
    assert [row.get("score") is not None for row in found] == [True] * 3 + [False] * 4
    assert {row["id"] for row in found[:3]} == {row["id"] for row in plain[:3]} and found[3:] == plain[3:]
    probabilities = hf_vlp.predict("retrieval", index.model, index.processor, IMAGES, TEXTS[:1])
    for row in found[:3]:
        expected = probabilities[int(row["id"])]["probability"]
        assert row["probability"] == pytest.approx(expected, abs=1e-5)
    assert index.search(text=TEXTS[0], k=2, rerank=3) == found[:2]
    assert index.search(text=TEXTS[0], k=7) == index.search(text=TEXTS[0], k=7, rerank=7)


def test_no_image_is_seen_again(monkeypatch):
    index = filled()

    def refuse(*_):
        raise AssertionError("an image is encoded")

    monkeypatch.setattr(type(index.model), "get_image_features", refuse)
    monkeypatch.setattr(type(index.model), "project_image", refuse)
    assert len(index.search(text=TEXTS[0])) == 7


# On disk


def test_added_at_once_in_pieces_or_one_by_one(tmp_path, monkeypatch):
    whole = filled(tmp_path / "whole")
    parted = RetrievalIndex(whole.model, whole.processor, tmp_path / "parted")
    parted.add(IMAGES[:3], ids=[0, 1, 2])
    parted.add(iter(IMAGES[3:]), ids=[3, 4, 5, 6])
    monkeypatch.setattr(index_module, "PIECE_BYTES", 1)
    single = RetrievalIndex(whole.model, whole.processor, tmp_path / "single")
    single.add(IMAGES, ids=range(7), batch_size=2)
    assert [len(list((tmp_path / name).glob("piece-*"))) for name in ("whole", "parted", "single")] == [
        1,
        2,
        4,
    ]
    expected = whole.search(text=TEXTS)
    for index in (parted, single):
        assert index.ids == whole.ids and len(index) == 7 and 3 in index and "3" in index and 7 not in index
        torch.testing.assert_close(index._pieces.features(), whole._pieces.features())
        for found, rows in zip(index.search(text=TEXTS), expected, strict=True):
            assert [row["id"] for row in found] == [row["id"] for row in rows]
            assert [row["score"] for row in found] == pytest.approx([row["score"] for row in rows], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_loaded_it_is_the_same(dtype, tmp_path, monkeypatch):
    index = filled(dtype=dtype)
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 4096 * 3)
    index.save(tmp_path / "copy")
    copy = RetrievalIndex.load(tmp_path / "copy", index.model, index.processor)
    assert copy.ids == index.ids
    assert torch.equal(copy._pieces.features(), index._pieces.features())
    places = list(range(7))
    assert torch.equal(copy._pieces.states(places), index._pieces.states(places))
    assert copy._pieces.states(places).dtype == getattr(torch, dtype)
    assert copy.search(text=TEXTS) == index.search(text=TEXTS) and copy.search(text=[]) == []
    assert copy.search(image=IMAGES) == index.search(image=IMAGES)
    with pytest.raises(ValueError, match="not an empty folder"):
        index.save(tmp_path / "copy")
    copy.add([picture(9)])
    assert (
        copy.ids[-1] == "7" and len(RetrievalIndex.load(tmp_path / "copy", index.model, index.processor)) == 8
    )


def test_what_was_written_stays_when_an_image_is_bad(tmp_path):
    model, processor = parts()
    index = RetrievalIndex(model, processor, tmp_path / "index")
    with pytest.raises(BadImageError, match="none.png"):
        index.add([*IMAGES[:4], "none.png", *IMAGES[4:]], batch_size=2)
    assert index.ids == ["0", "1", "2", "3"]
    again = RetrievalIndex.load(tmp_path / "index", model, processor)
    assert again.ids == index.ids and again.search(text=TEXTS[0]) == index.search(text=TEXTS[0])


def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch):
    index = filled(tmp_path / "index")

    def cut(tensors, path, metadata):
        path.write_bytes(b"half a piece")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pieces_module, "save_file", cut)
        with pytest.raises(KeyboardInterrupt):
            index.add([picture(20)])
        with pytest.raises(KeyboardInterrupt):
            index.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "index.json",
        "piece-00000.safetensors",
    ]
    killed = tmp_path / "index" / ".piece-00001.safetensors.unfinished"
    killed.write_bytes(b"of a process that was killed")
    again = RetrievalIndex.load(tmp_path / "index", index.model, index.processor)
    assert len(again) == 7 and again.search(text=TEXTS) == index.search(text=TEXTS)
    again.add([picture(20)])
    assert len(again) == 8


def test_two_writers_do_not_overwrite_one_another(tmp_path):
    index = filled(tmp_path / "index")
    other = RetrievalIndex.load(tmp_path / "index", index.model, index.processor)
    other.add([picture(20)], ids=["other"])
    with pytest.raises(ValueError, match="load the index again"):
        index.add([picture(21)], ids=["one"])
    again = RetrievalIndex.load(tmp_path / "index", index.model, index.processor)
    assert again.ids == [*index.ids, "other"]


def test_a_piece_that_is_not_whole_is_named(tmp_path):
    index = filled(tmp_path / "index")
    piece = tmp_path / "index" / "piece-00000.safetensors"
    piece.write_bytes(piece.read_bytes()[:-10])
    with pytest.raises(ValueError, match="piece-00000.safetensors is not a whole piece"):
        RetrievalIndex.load(tmp_path / "index", index.model, index.processor)


def test_paths_are_the_ids_of_files(tmp_path):
    for i in range(2):
        IMAGES[i].save(tmp_path / f"{i}.png")
    index = RetrievalIndex(*parts())
    index.add([tmp_path / "0.png", str(tmp_path / "1.png")])
    assert index.ids == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


# The model


def test_the_model_is_found_by_its_name(tmp_path):
    for part in make_head(hf_vlp.ALBEFForPreTraining):
        part.save_pretrained(tmp_path / "model")
    model, processor = (
        hf_vlp.load_head("retrieval", tmp_path / "model"),
        make_head(hf_vlp.ALBEFForRetrieval)[1],
    )
    index = RetrievalIndex(model, processor, tmp_path / "index")
    index.add(IMAGES)
    assert RetrievalIndex.load(tmp_path / "index").search(text=TEXTS) == index.search(text=TEXTS)
    halved = hf_vlp.load_head("retrieval", tmp_path / "model", dtype="bfloat16")
    assert len(RetrievalIndex.load(tmp_path / "index", halved, processor).search(text=TEXTS[0])) == 7
    pretrained = hf_vlp.load_head("pretrain", tmp_path / "model")
    assert len(RetrievalIndex.load(tmp_path / "index", pretrained, processor)) == 7


@pytest.mark.parametrize("change", ["weight", "config", "head"])
def test_another_model_is_refused(change, tmp_path):
    index = filled(tmp_path / "index")
    model, processor = parts(HEADS[1] if change == "head" else HEADS[0])
    if change == "weight":
        model.itm_head.fc1.weight.data[0, 0] += 1
    if change == "config":
        model.config.head_layer_norm_eps *= 2
    with pytest.raises(ValueError, match="weights or config differ"):
        RetrievalIndex.load(tmp_path / "index", model, processor)
    with pytest.raises(ValueError, match="without a name; give model"):
        RetrievalIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match="give both or none"):
        RetrievalIndex.load(tmp_path / "index", index.model)


@pytest.mark.parametrize(
    "head", [hf_vlp.LXMERTForRetrieval, hf_vlp.SOHOForRetrieval, hf_vlp.XVLMForGrounding]
)
def test_models_without_features_are_refused(head):
    with pytest.raises(ValueError, match=f"model is {head.__name__}, which has no features"):
        RetrievalIndex(*make_head(head))


# Bad input


def test_what_does_not_fit_is_named(tmp_path):
    model, processor = parts()
    for options in ({"states": "pixels"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="states is .* and dtype"):
            RetrievalIndex(model, processor, **options)
    index = RetrievalIndex(model, processor)
    with pytest.raises(ValueError, match="the index is empty"):
        index.search(text="a red circle")
    with pytest.raises(ValueError, match="ids has 1 for 2 images"):
        index.add(IMAGES[:2], ids=["one"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        index.add(IMAGES[:2], batch_size=0)
    with pytest.raises(ValueError, match="id 'one' comes twice"):
        index.add(IMAGES[:2], ids=["one", "one"])
    assert len(index) == 0
    index.add(IMAGES[:1], ids=["one"])
    with pytest.raises(ValueError, match="id 'one' comes twice, or is in the index"):
        index.add(IMAGES[1:3], ids=["two", "one"])
    assert index.ids == ["one"]
    with pytest.raises(ValueError, match="either text or image"):
        index.search()
    with pytest.raises(ValueError, match="either text or image"):
        index.search(text="a", image=IMAGES[0])
    for options in ({"k": 0}, {"rerank": -1}):
        with pytest.raises(ValueError, match="k is .* and rerank"):
            index.search(text="a red circle", **options)
    with pytest.raises(ValueError, match="not matched with images"):
        index.search(image=IMAGES[0], rerank=3)
    without = filled(states=None)
    assert without.search(text=TEXTS[0])[0].keys() == {"id", "cosine"}
    with pytest.raises(ValueError, match="keeps no states"):
        without.search(text=TEXTS[0], rerank=3)
    with pytest.raises(ValueError, match="holds no index"):
        RetrievalIndex.load(tmp_path, model, processor)
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match="open an index with RetrievalIndex.load"):
        RetrievalIndex(model, processor, tmp_path)


def test_states_that_halves_cannot_hold():
    model, processor = parts()
    model.model.fusion_model.image_key_values[0].key.weight.data.mul_(1e6)
    index = RetrievalIndex(model, processor, dtype="float16")
    with pytest.raises(ValueError, match="dtype float16 cannot hold"):
        index.add(IMAGES[:2])
    assert len(index) == 0


# The Hub

PUSH = """
import json, sys
from test_retrieval_index import IMAGES, TEXTS, parts, hf_vlp
model, processor = parts()
hf_vlp.pipeline("image-text-retrieval", model, processor).push_to_hub("org/matcher", private=True)
model = hf_vlp.load_head("retrieval", "org/matcher", revision="main")
index = hf_vlp.RetrievalIndex(model, processor, sys.argv[1])
index.add(IMAGES, ids=range(7))
print("pushed to", index.push_to_hub("org/gallery", private=True))
print(json.dumps({"found": index.search(text=TEXTS)}))
"""
LOAD = """
import json, sys
from transformers import pipeline
from test_retrieval_index import IMAGES, TEXTS, picture, pytest, hf_vlp
index = hf_vlp.RetrievalIndex.load("org/gallery", revision="main")  # and the model by its name
with pytest.raises(ValueError, match="is a download"):
    index.add([picture(9)])
index.save(sys.argv[1])
own = hf_vlp.RetrievalIndex.load(sys.argv[1])
own.add([picture(9)])
assert len(own) == 8 and len(index) == 7
pipe = pipeline("vlp-image-text-retrieval", model="org/matcher", device="cpu")
ours = hf_vlp.pipeline("image-text-retrieval", model="org/matcher", hub={"revision": "main"}, device="cpu")
assert pipe(IMAGES[0], TEXTS) == ours(IMAGES[0], TEXTS)
print(json.dumps({"found": index.search(text=TEXTS)}))
"""


def test_index_and_pipeline_go_to_the_hub_and_come_back(hub, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pushed = run_client(hub, PUSH, tmp_path / "one", tmp_path / "index")
    loaded = run_client(hub, LOAD, tmp_path / "two", tmp_path / "own")
    assert pushed == loaded and len(loaded["found"]) == 3
    assert set(hub.repos["org/gallery"].files("main")) == {"index.json", "piece-00000.safetensors"}
    assert {"README.md", "model.safetensors", "processor_config.json"} <= set(
        hub.repos["org/matcher"].files("main")
    )
