"""Ask X-VLM about an image: which texts match it, and where is what a phrase names?

    python examples/predict.py --model quickstart/pretrained
    python examples/predict.py --model ORG/NAME --image photo.jpg \\
        --text "two dogs on a beach" --text "a bowl of soup" --phrase "the brown dog"

Without --image it draws a scene of shapes with texts about it. The boxes are drawn into predicted.png.
"""

import argparse

import torch
from PIL import Image

from hf_vlp import XVLMConfig, XVLMForGrounding, XVLMForRetrieval, XVLMProcessor
from hf_vlp.data.shapes import shapes_dataset
from hf_vlp.visualization import draw_boxes

# 1. What to do
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or Hub name of a pre-trained or fine-tuned X-VLM")
parser.add_argument("--image", help="an image file; without it a drawn scene of shapes")
parser.add_argument("--text", action="append", default=[], help="a text to match; may be given several times")
parser.add_argument("--phrase", action="append", default=[], help="what to point at; likewise")
parser.add_argument("--out", default="predicted.png", help="where the image with the boxes goes")
options = parser.parse_args()
if not options.model:
    parser.error(
        "no --model. Make one in a few minutes with `hf-vlp quickstart` (then --model quickstart/pretrained) "
        "or with examples/pretrain.py (--model runs/pretrain), or convert an official checkpoint with "
        "`hf-vlp convert xvlm`"
    )

# 2. The image and the texts
if options.image:
    image = Image.open(options.image).convert("RGB")
else:
    scene = shapes_dataset("foils", "test", 1)[0]
    image = scene["image"]
    options.text = options.text or [scene["caption"], scene["foil"]]
    options.phrase = options.phrase or shapes_dataset("regions", "test", 1)[0]["phrases"]

# 3. Which texts match? A pre-trained model has the heads of both tasks, a fine-tuned one that of its own.
processor = XVLMProcessor.from_pretrained(options.model)
head = XVLMConfig.from_pretrained(options.model).architectures[0]
if options.text and head in ("XVLMForPreTraining", "XVLMForRetrieval"):
    model = XVLMForRetrieval.from_pretrained(options.model).eval()
    batch = processor(images=[image], text=options.text, return_tensors="pt")
    with torch.inference_mode():
        image_embeds = model.get_image_features(batch["pixel_values"]).last_hidden_state
        text_embeds = model.get_text_features(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        logits = model.match(text_embeds, batch["attention_mask"], model.project_image(image_embeds))
    for text, probability in zip(options.text, logits.softmax(dim=-1)[:, 1].tolist(), strict=True):
        print(f"{probability:.3f} matches: {text}")
elif options.text:
    print(f"{options.model} holds {head}, which matches no texts")

# 4. Where is it? All phrases share one pass over the image.
if options.phrase and head in ("XVLMForPreTraining", "XVLMForGrounding"):
    model = XVLMForGrounding.from_pretrained(options.model).eval()
    batch = processor(images=[image], text=options.phrase, return_tensors="pt")
    image_of_phrase = torch.zeros(len(options.phrase), dtype=torch.long)
    with torch.inference_mode():
        boxes = model(**batch, region_image_index=image_of_phrase).pred_boxes
    boxes = processor.post_process_boxes(boxes, [(image.height, image.width)] * len(boxes)).tolist()
    for phrase, box in zip(options.phrase, boxes, strict=True):
        print(f"{[round(value) for value in box]} left, top, right, bottom: {phrase}")
    draw_boxes(image, boxes, options.phrase).save(options.out)
    print(f"drawn into {options.out}")
elif options.phrase:
    print(f"{options.model} holds {head}, which points at nothing")
