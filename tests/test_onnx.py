"""Heads as ONNX files: in onnxruntime, other numbers and lengths of texts give what the model gives."""

import onnxruntime
import pytest
import torch
from test_models import _build
from tiny import FEATURE_DIM, IMAGE_SIZE, text_batch
from typer.testing import CliRunner

import hf_vlp
import hf_vlp.heads
import hf_vlp.onnx_export
from hf_vlp.cli import app
from hf_vlp.models.modeling_soho import VisualTokens

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Folder:
    """The files of a folder, each called by its name with tensors by theirs."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.files = {
            file.stem: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            for file in path.glob("*.onnx")
        }

    def __call__(self, name, **tensors):
        session = self.files[name]
        assert {one.name for one in session.get_inputs()} == set(tensors)
        outputs = session.run(None, {key: value.numpy() for key, value in tensors.items()})
        names = [one.name for one in session.get_outputs()]
        return {key: torch.from_numpy(value) for key, value in zip(names, outputs, strict=True)}


def _texts(rows):
    """With padding in a few of them, longer than what is traced."""
    texts = text_batch(rows, length=9, padding=2, seed=rows)
    texts["attention_mask"][0, 4:] = 0
    return texts


def _check(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["xvlm-retrieval", "albef-pretraining"])
def test_image_and_text(name, tmp_path):
    model, _ = _build(name)
    files = ["image.onnx", "text.onnx", "fusion.onnx"]
    assert hf_vlp.export_onnx(model, tmp_path / "out") == files
    onnx = Folder(tmp_path / "out")
    for rows in (5, 1):
        pixels, texts = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE), _texts(rows)
        image, text = model.get_image_features(pixels), model.get_text_features(**texts)
        seen = {"image_embeds": image.last_hidden_state, "image_features": image.pooler_output}
        read = {"text_embeds": text.last_hidden_state, "text_features": text.pooler_output}
        _check(onnx("image", pixel_values=pixels), seen)
        ours = onnx("text", **texts)
        words = texts["attention_mask"].bool()
        _check({key: value[words] if value.ndim == 3 else value for key, value in ours.items()},
               {key: value[words] if value.ndim == 3 else value for key, value in read.items()})  # fmt: skip
        mask = texts["attention_mask"]
        inputs = {"text_embeds": read["text_embeds"], "image_embeds": seen["image_embeds"]}
        expected = model.match(inputs["text_embeds"], mask, model.project_image(inputs["image_embeds"]))
        _check(onnx("fusion", attention_mask=mask, **inputs), {"logits": expected})


@torch.no_grad()
def test_soho(tmp_path):
    model, _ = _build("soho-retrieval")
    assert hf_vlp.export_onnx(model, tmp_path / "out") == ["image.onnx", "fusion.onnx"]
    onnx = Folder(tmp_path / "out")
    for rows, height, width in ((5, 128, 192), (1, 192, 64)):
        pixels, pixel_mask = torch.randn(rows, 3, height, width), torch.ones(rows, height, width).bool()
        pixel_mask[0, -64:] = False
        image, texts = model.get_image_features(pixels, pixel_mask), _texts(rows)
        seen = {"states": image.states, "positions": image.positions, "mask": image.mask}
        _check(onnx("image", pixel_values=pixels, pixel_mask=pixel_mask), seen)
        expected = model.match(**texts, images=VisualTokens(**seen))
        _check(onnx("fusion", **texts, **seen), {"logits": expected})


@torch.no_grad()
def test_lxmert(tmp_path):
    model, _ = _build("lxmert-retrieval")
    assert hf_vlp.export_onnx(model, tmp_path / "out") == ["text.onnx", "regions.onnx", "cross.onnx"]
    onnx = Folder(tmp_path / "out")
    for rows, regions in ((5, 8), (1, 3)):
        texts = _texts(rows)
        seen = {
            "visual_feats": torch.randn(rows, regions, FEATURE_DIM),
            "visual_pos": torch.rand(rows, regions, 4),
            "visual_attention_mask": torch.ones(rows, regions, dtype=torch.long),
        }
        seen["visual_attention_mask"][0, -1] = 0
        words = model.get_text_features(**texts).last_hidden_state
        regions_seen = model.get_image_features(**seen).last_hidden_state
        mask = texts["attention_mask"].bool()
        torch.testing.assert_close(onnx("text", **texts)["words"][mask], words[mask], **CLOSE)
        _check(onnx("regions", **seen), {"regions": regions_seen})
        masks = {"attention_mask": texts["attention_mask"]}
        masks["visual_attention_mask"] = seen["visual_attention_mask"]
        expected = model.match(words, masks["attention_mask"], regions_seen, masks["visual_attention_mask"])
        _check(onnx("cross", words=words, regions=regions_seen, **masks), {"logits": expected})


def test_other_heads_are_refused(tmp_path):
    model, _ = _build("xvlm-grounding")
    with pytest.raises(ValueError, match="XVLMForGrounding, which matches no images"):
        hf_vlp.export_onnx(model, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    model, _ = _build("albef-retrieval")
    with pytest.raises(ValueError, match="not an empty folder"):
        hf_vlp.export_onnx(model, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_what_cannot_be_exported_leaves_nothing(tmp_path, monkeypatch):
    model, _ = _build("albef-retrieval")
    see = type(model).get_image_features
    monkeypatch.setattr(
        type(model), "get_image_features", lambda self, x: see(self, x if x.sum() > 0 else -x)
    )
    with pytest.raises(ValueError, match="image of ALBEFForRetrieval cannot be exported"):
        hf_vlp.export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(hf_vlp.heads, "load_head", lambda *args: args)
    monkeypatch.setattr(
        hf_vlp.onnx_export, "export_onnx", lambda *args: calls.append(args) or ["image.onnx", "text.onnx"]
    )
    result = CliRunner().invoke(app, ["export-onnx", "some/model", str(tmp_path / "out")])
    assert result.exit_code == 0 and "image.onnx, text.onnx written to" in result.output
    assert calls == [(("retrieval", "some/model"), tmp_path / "out")]
