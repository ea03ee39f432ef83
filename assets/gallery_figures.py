"""The figures of the gallery, each with the commands that make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    about: str  # one to three sentences of Markdown
    commands: tuple[str, ...]  # shell commands that begin with "unclip", or blocks of Python
    outputs: tuple[str, ...]  # files that the commands write
    needs: str = ""  # "training data", or "inpainter" for a model that has one


FIGURES = (
    Figure(
        "sources",
        "Source images",
        "The following figures start from two generated images. Any other image works, too.",
        (
            'unclip generate "a red apple" --seed 0 -o apple.png',
            'unclip generate "a smiling face" --seed 0 -o face.png',
        ),
        ("apple.png", "face.png"),
    ),
    Figure(
        "reconstruct",
        "Two-part latents",
        "Inversion turns an image into an embedding and noise, from which the decoder reconstructs "
        "it. Corrections at each step (first figure) keep the reconstruction exact under guidance; "
        "plain DDIM inversion (second figure) does not.",
        (
            "unclip reconstruct apple.png face.png --save-latent both.safetensors --grid -o "
            "again.png",
            "unclip reconstruct apple.png face.png --iterations 0 --grid -o plain.png",
        ),
        ("again.png", "plain.png"),
    ),
    Figure(
        "vary",
        "Variations",
        "`--eta` sets how much of the image's own noise is replaced: 0.3 (first figure) and 1 "
        "(second figure).",
        (
            "unclip vary both.safetensors --eta 0.3 -n 4 --seed 0 --grid -o near.png",
            "unclip vary both.safetensors --eta 1 -n 4 --seed 0 --grid -o far.png",
        ),
        ("near.png", "far.png"),
    ),
    Figure(
        "embeddings",
        "Embedding arithmetic",
        "`unclip.embeddings` computes with embeddings: here it mixes those of the two images in "
        "three proportions.",
        (
            "import unclip\n"
            "from unclip.embeddings import mix\n"
            "from unclip.image_io import grid\n\n"
            'pipe = unclip.load("emoji")\n'
            'parts = pipe.encode_image(["apple.png", "face.png"])\n'
            "mixed = [mix(parts, weights) for weights in ((2, 1), (1, 1), (1, 2))]\n"
            "results = [pipe.variations(image_emb=emb[None], num_images=2, seed=0) "
            "for emb in mixed]\n"
            "images = [image for result in results for image in result.images]\n"
            'grid(images, columns=6).save("mixed.png")',
        ),
        ("mixed.png",),
    ),
    Figure(
        "interpolate",
        "Interpolation",
        "Spherical interpolation of both embedding and noise; with the noise of the first image "
        "throughout; and between two prompts. A `.gif` or `.mp4` output is an animation; `--even` "
        "places its frames at equal steps of the CLIP embedding.",
        (
            "unclip interpolate both.safetensors --frames 7 -o between.png",
            "unclip interpolate both.safetensors --frames 7 --noise first -o first.png",
            'unclip interpolate --prompts "a green tree" "a blue fish" --noise random --seed 0 '
            "-o prompts.png",
            "unclip interpolate both.safetensors --frames 16 --even -o between.gif",
        ),
        ("between.png", "first.png", "prompts.png", "between.gif"),
    ),
    Figure(
        "diff",
        "Text diffs",
        "The embedding is rotated towards the difference of two captions, or of one caption and "
        "the empty one; most of the noise is kept. `--eta 0` keeps all of it, as in figure 5 of "
        "the paper: the first image is then the given one, but its outlines remain visible in the "
        "following ones.",
        (
            'unclip diff face.png --from "a smiling face" --to "an angry face" '
            "--theta 0 0.1 0.2 0.3 0.4 0.5 --grid --seed 0 -o angry.png",
            'unclip diff apple.png --to "a yellow lemon" --theta 0 0.1 0.2 0.3 0.4 0.5 --grid '
            "--seed 0 -o lemon.png",
            'unclip diff apple.png --to "a yellow lemon" --theta 0 0.1 0.2 0.3 0.4 0.5 --eta 0 '
            "--grid -o shreds.png",
        ),
        ("angry.png", "lemon.png", "shreds.png"),
    ),
    Figure(
        "components",
        "Principal components",
        "Images decoded from the first principal components of an embedding, as in figure 7 of "
        "the paper.",
        ("unclip probe apple.png face.png --data data/emoji/train-*.tar -o components.png",),
        ("components.png",),
        needs="training data",
    ),
    Figure(
        "attack",
        "Typographic attack",
        "A label with a word changes how CLIP classifies the image. The bundled CLIP was trained "
        "on emoji and cannot read, so here the label itself has the effect; a public CLIP reads "
        "the word.",
        (
            'unclip probe apple.png --word pizza --classes "a red apple" "a slice of pizza" '
            "--seed 0 -o attack.png",
        ),
        ("attack.png",),
    ),
    Figure(
        "inpaint",
        "Inpainting",
        "The white part of the mask is generated; all other pixels are kept bit for bit. A decoder "
        "that uses a layout adapts the layout to the kept pixels, so that outlines continue; "
        "`--agreement 0` turns this off.",
        (
            "from PIL import Image\n\n"
            'mask = Image.new("L", Image.open("face.png").size)\n'
            "width, height = mask.size\n"
            "mask.paste(255, (0, height // 2, width, height))\n"
            'mask.save("mask.png")',
            'unclip edit face.png --mask mask.png --prompt "a sad face with tears" -n 4 --seed 0 '
            "--grid -o painted.png",
        ),
        ("mask.png", "painted.png"),
    ),
    Figure(
        "training-free",
        "Training-free inpainting",
        "The same without conditioning the decoder on the kept pixels; only the noised image and "
        "the prompt guide it.",
        (
            'unclip edit face.png --mask mask.png --prompt "a sad face with tears" -n 4 --seed 0 '
            "--training-free --grid -o free.png",
        ),
        ("free.png",),
        needs="inpainter",
    ),
    Figure(
        "outpaint",
        "Outpainting and image to image",
        "Outpainting extends an image beyond its borders; this model of single objects adds more "
        "of them. Image to image (`--strength`) starts from the noised image.",
        (
            'unclip edit apple.png --extend 64 0 64 0 --prompt "a red apple" --seed 0 -o wider.png',
            'unclip edit apple.png --prompt "a slice of pizza" --strength 0.7 -n 3 --seed 0 --grid '
            "-o over.png",
        ),
        ("wider.png", "over.png"),
    ),
    Figure(
        "prompts",
        "Mixed and negative prompts",
        "Prior and decoder follow a mixture of two prompts, or are guided away from a negative "
        "prompt.",
        (
            'unclip generate "a smiling face" "a smiling cat" --mix 1 1 -n 4 --seed 0 --grid '
            "-o catlike.png",
            'unclip generate "a heart" -n 4 --seed 0 --grid -o heart.png',
            'unclip generate "a heart" --negative-prompt "a red heart" -n 4 --seed 0 --grid '
            "-o not-red.png",
        ),
        ("catlike.png", "heart.png", "not-red.png"),
    ),
    Figure(
        "colours",
        "New colours",
        "Colours that these objects do not have in the data sets. The model was also trained on "
        "recoloured copies of the images.",
        (
            'unclip generate "a blue apple" "a green heart" "an orange cat" "a purple car" '
            '"a pink house" "a purple fish" --seed 0 --grid -o colours.png',
        ),
        ("colours.png",),
    ),
    Figure(
        "ablations",
        "Ablations of the prior",
        "The decoder conditioned on the prior's embedding, on the text embedding in its place, and "
        "on text only (unCLIP section 5.1).",
        (
            'unclip generate "a red apple" -n 4 --seed 0 --grid -o prior.png',
            'unclip generate "a red apple" --embedding text -n 4 --seed 0 --grid -o text.png',
            'unclip generate "a red apple" --embedding none -n 4 --seed 0 --grid -o none.png',
        ),
        ("prior.png", "text.png", "none.png"),
    ),
)
