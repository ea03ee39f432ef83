"""Draw the images of a dataset again with an unCLIP model, from their captions and layouts.

python -m unclip.data.complete 'data/emoji_styles/train-*.tar' data/emoji_completed
python train/draw.py --model emoji --data 'data/emoji_completed/train-*.tar' --out data/emoji_drawn

Images that were predicted at the size of a layout become images of the decoder's size, on which
models without layouts can be trained. Rerun to resume; complete shards are skipped.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Sequence

from PIL import Image
from tqdm import tqdm

from unclip.data.loader import open_dataset
from unclip.data.precompute import start
from unclip.data.precomputed import PrecomputedDataset
from unclip.data.samples import Sample
from unclip.data.shards import add_members
from unclip.files import error_text
from unclip.image_io import to_pil
from unclip.pipelines import load
from unclip.pipelines.request import generators_from
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

BATCH, SHARD = 32, 512  # images


def main(model: str, data: str, out: str, seed: int) -> None:
    pipe, dataset = load(model), open_dataset(data)
    if not isinstance(pipe, UnCLIPPipeline) or pipe.decoder_stage.layout_stage is None:
        raise ValueError(f"{model} does not start from layouts; expected a model such as emoji")
    if isinstance(dataset, PrecomputedDataset):
        raise ValueError(f"{data} contains precomputed data; expected images")
    folder = start(out, "draw.json", {"model": pipe.name, "data": data, "seed": seed}).folder
    with tqdm(total=len(dataset), unit=" images") as bar:
        for first in range(0, len(dataset), SHARD):
            rows = range(len(dataset))[first : first + SHARD]
            shard = folder / f"train-{first // SHARD:05d}.tar"
            if shard.exists():
                bar.update(len(rows))
                continue
            with tarfile.open(shard.with_suffix(".part"), "w") as tar:
                for batch in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
                    samples = [dataset[row] for row in batch]
                    write(tar, samples, draw(pipe, samples, [seed + row for row in batch]))
                    bar.update(len(batch))
            shard.with_suffix(".part").replace(shard)
    print(f"{out}: {len(dataset)} images")


def draw(
    pipe: UnCLIPPipeline, samples: Sequence[Sample], seeds: Sequence[int]
) -> list[Image.Image]:
    """Draw the first caption of each sample, starting from a variation of its layout."""
    text, generators = pipe.encode_text([s.captions[0] for s in samples]), generators_from(seeds)
    image_emb = pipe.sample_prior(text, generators=generators)
    layouts = pipe.encode_layout([sample.image for sample in samples])
    return to_pil(pipe.decode(image_emb, text, generators=generators, like=layouts))


def write(tar: tarfile.TarFile, samples: Sequence[Sample], images: Sequence[Image.Image]) -> None:
    """Add images with the keys and metadata of samples."""
    for sample, image in zip(samples, images, strict=True):
        file = io.BytesIO()
        image.save(file, "PNG")
        meta = {**sample.meta, "captions": sample.captions, "weight": sample.weight}
        add_members(tar, sample.key, {"png": file.getvalue(), "json": meta})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "an unCLIP model with a layout prior: a name, folder or Hub id"
    parser.add_argument("--model", required=True, metavar="MODEL", help=about)
    about = "images: tar shards or a folder"
    parser.add_argument("--data", required=True, metavar="DATA", help=about)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for train-*.tar")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    args = parser.parse_args()
    try:
        main(args.model, args.data, args.out, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error_text(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes")
