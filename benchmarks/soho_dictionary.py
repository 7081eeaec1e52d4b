"""Speed of SOHO's visual dictionary in training: nearest entries, their moving averages, and the look-up.

The official way, written out here, takes each image as often as it has texts, and counts, sums and looks up
with products of a one-hot matrix of cells and entries. This package looks each image up once, counts its
cells as often as they would be there, and adds and picks rows. Asserts that both give the same numbers, and
prints the table of docs/benchmarks.md:

    python benchmarks/soho_dictionary.py

B: images, S: texts of each, N: cells of an image, M: B * S * N, D: hidden width, K: entries.
"""

from copy import deepcopy

import torch
from measuring import build_parser, in_turn, machine, median, ratio
from torch import Tensor

from hf_vlp import SOHOConfig
from hf_vlp.models.modeling_soho import VisualDictionary

TEXTS, CELLS = 4, 144  # 9 x 16, of a canvas of 608 x 1024 pixels
OURS, OFFICIAL = "this package", "official"
TOLERANCE = 1e-4  # of numbers around 1


def build_dictionary(device: str) -> VisualDictionary:
    """The paper's, which keeps the entries that no cell is near to."""
    dictionary = VisualDictionary(SOHOConfig.paper())
    dictionary.reset()
    return dictionary.to(device).train()


def build_cells(dictionary: VisualDictionary, images: int) -> Tensor:
    """Cells (B, N, D) around random entries, so that rounding cannot change which is the nearest."""
    chosen = torch.randint(len(dictionary.embeddings), (images, CELLS), device=dictionary.embeddings.device)
    entries = dictionary.embeddings[chosen]
    return entries + 0.3 * torch.randn_like(entries)


def look_up(dictionary: VisualDictionary, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Entries (B * S, N, D) and their numbers (B * S, N) as this package gives them to the texts."""
    entries, nearest = dictionary(cells, copies=TEXTS)
    return entries.repeat_interleave(TEXTS, dim=0), nearest.repeat_interleave(TEXTS, dim=0)


def official_look_up(dictionary: VisualDictionary, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The same of cells (B * S, N, D) that are there S times each, by one-hot matrices."""
    rows = cells.flatten(0, 1)  # (M, D)
    with torch.no_grad():
        squares = rows.square().sum(dim=1, keepdim=True) + dictionary.embeddings.square().sum(dim=1)
        nearest = (squares - 2 * rows @ dictionary.embeddings.T).argmin(dim=1)  # (M,)
        one_hot = rows.new_zeros(len(rows), len(dictionary.embeddings)).scatter_(1, nearest[:, None], 1)
        counts, sums = one_hot.sum(dim=0), one_hot.T @ rows  # (K,), (K, D)
        decay, eps = dictionary.decay, dictionary.eps
        dictionary.usage.add_(counts)
        dictionary.ema_count.mul_(decay).add_((1 - decay) * counts)
        dictionary.ema_sum.mul_(decay).add_((1 - decay) * sums)
        total = dictionary.ema_count.sum()
        smoothed = (dictionary.ema_count + eps) / (total + len(counts) * eps) * total
        dictionary.embeddings.copy_(dictionary.ema_sum / smoothed[:, None])
        entries = one_hot @ dictionary.embeddings
    straight_through = rows + (entries - rows).detach()
    return straight_through.view(cells.shape), nearest.view(cells.shape[:2])


def check(dictionary: VisualDictionary, cells: Tensor):
    """Assert that both ways give the same entries and leave the same dictionary, in three steps."""
    ours, official = deepcopy(dictionary), deepcopy(dictionary)
    copies = cells.repeat_interleave(TEXTS, dim=0)
    for _ in range(3):
        (entries, nearest), (their_entries, their_nearest) = (
            look_up(ours, cells),
            official_look_up(official, copies),
        )
        assert torch.equal(nearest, their_nearest), "the two ways choose other entries"
        pairs = [(entries, their_entries)]
        pairs += [(getattr(ours, name), other) for name, other in official.named_buffers()]
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def main():
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=16, help="images of a batch, of 4 texts each")
    options = parser.parse_args()
    torch.manual_seed(0)
    dictionary = build_dictionary(options.device)
    cells = build_cells(dictionary, options.images)
    check(dictionary, cells)

    official = deepcopy(dictionary)
    cells.requires_grad_(True)
    copies = cells.detach().repeat_interleave(TEXTS, dim=0).requires_grad_(True)
    ways = {OURS: lambda: look_up(dictionary, cells), OFFICIAL: lambda: official_look_up(official, copies)}
    times = in_turn(ways, options.rounds)
    print(f"{machine(options.device, 'float32')}; {options.images} images, in {options.rounds} rounds.\n")
    print("| way | cells looked up | seconds | times this package's |\n|---|---|---|---|")
    for way, rows in ((OURS, cells), (OFFICIAL, copies)):
        count = rows.shape[0] * rows.shape[1]
        print(f"| {way} | {count:,} | {median(times, way):.3f} | {ratio(times, way, OURS):.1f} |")


if __name__ == "__main__":
    main()
