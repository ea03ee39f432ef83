"""The figures of the gallery, each with the lines that make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    about: str  # a sentence or two of Markdown
    lines: tuple[str, ...]  # of a shell if they begin with "unclip", else blocks of Python
    shows: tuple[str, ...]  # files that the lines write
    needs: str = ""  # what a model must have for it: "training data", "inpainter"


FIGURES = (
    Figure(
        "sources",
        "What all that follows starts from",
        "Two pictures that the model draws; yours may come from anywhere.",
        (
            'unclip generate "a red apple" --seed 0 -o apple.png',
            'unclip generate "a smiling face" --seed 0 -o face.png',
        ),
        ("apple.png", "face.png"),
    ),
    Figure(
        "reconstruct",
        "Two-part latents",
        "Inverted, a picture is an embedding and noise, of which it is drawn again. Plain DDIM inversion (below) goes "
        "astray under guidance; corrections at each step (above) don't.",
        (
            "unclip reconstruct apple.png face.png --save-latent both.safetensors --grid -o again.png",
            "unclip reconstruct apple.png face.png --iterations 0 --grid -o plain.png",
        ),
        ("again.png", "plain.png"),
    ),
    Figure(
        "vary",
        "Variations",
        "The larger `--eta`, the less of the picture's own noise is left: 0.3 above, 1 below.",
        (
            "unclip vary both.safetensors --eta 0.3 -n 4 --seed 0 --grid -o near.png",
            "unclip vary both.safetensors --eta 1 -n 4 --seed 0 --grid -o far.png",
        ),
        ("near.png", "far.png"),
    ),
    Figure(
        "embeddings",
        "From embeddings alone",
        "Arithmetic of embeddings is in `unclip.embeddings`: here the two pictures' mixture, in three proportions.",
        (
            "import unclip\n"
            "from unclip.embeddings import mix\n"
            "from unclip.image_io import grid\n\n"
            'pipe = unclip.load("emoji")\n'
            'parts = pipe.encode_image(["apple.png", "face.png"])\n'
            "mixed = [mix(parts, weights) for weights in ((2, 1), (1, 1), (1, 2))]\n"
            "drawn = [pipe.variations(image_emb=emb[None], num_images=2, seed=0).images for emb in mixed]\n"
            'grid([image for pair in drawn for image in pair], columns=6).save("mixed.png")',
        ),
        ("mixed.png",),
    ),
    Figure(
        "interpolate",
        "Interpolation",
        "Embedding and noise both along great circles; then the noise of the first picture throughout; then between "
        "prompts. A `.gif` or an `.mp4` moves; with `--even`, in steps that are equal for CLIP.",
        (
            "unclip interpolate both.safetensors --frames 7 -o between.png",
            "unclip interpolate both.safetensors --frames 7 --noise first -o first.png",
            'unclip interpolate --prompts "a green tree" "a blue fish" --noise random --seed 0 -o prompts.png',
            "unclip interpolate both.safetensors --frames 16 --even -o between.gif",
        ),
        ("between.png", "first.png", "prompts.png", "between.gif"),
    ),
    Figure(
        "diff",
        "Text diffs",
        "The embedding is turned by what sets one caption apart from another, or from none; most of the noise stays. "
        "With `--eta 0` all of it does, as in the paper's figure 5: the first picture is the one given, but shreds of "
        "it are left in those that follow.",
        (
            'unclip diff face.png --from "a smiling face" --to "an angry face" --theta 0 0.1 0.2 0.3 0.4 0.5 --grid '
            "--seed 0 -o angry.png",
            'unclip diff apple.png --to "a yellow lemon" --theta 0 0.1 0.2 0.3 0.4 0.5 --grid --seed 0 -o lemon.png',
            'unclip diff apple.png --to "a yellow lemon" --theta 0 0.1 0.2 0.3 0.4 0.5 --eta 0 --grid -o shreds.png',
        ),
        ("angry.png", "lemon.png", "shreds.png"),
    ),
    Figure(
        "components",
        "What CLIP sees, component by component",
        "Drawn from the first principal components of the embeddings, as in the paper's figure 7.",
        ("unclip probe apple.png face.png --data data/emoji/train-*.tar -o components.png",),
        ("components.png",),
        needs="training data",
    ),
    Figure(
        "attack",
        "A typographic attack",
        "A word on a label, and what CLIP then takes the picture for. The bundled CLIP was trained on emoji and cannot "
        "read: what moves it is the label. A public one can.",
        (
            'unclip probe apple.png --word pizza --classes "a red apple" "a slice of pizza" --seed 0 -o attack.png',
        ),
        ("attack.png",),
    ),
    Figure(
        "inpaint",
        "Inpainting",
        "White in the mask is painted anew; all else is kept bit for bit. A decoder that is shown a layout of what is "
        "asked for bends that to what is kept, so that outlines go on; with `--agreement 0` it is drawn as it was "
        "asked for.",
        (
            "from PIL import Image\n\n"
            'mask = Image.new("L", Image.open("face.png").size)\n'
            "width, height = mask.size\n"
            "mask.paste(255, (0, height // 2, width, height))\n"
            'mask.save("mask.png")',
            'unclip edit face.png --mask mask.png --prompt "a sad face with tears" -n 4 --seed 0 --grid -o painted.png',
        ),
        ("mask.png", "painted.png"),
    ),
    Figure(
        "training-free",
        "Inpainting by the plain decoder",
        "The same by a decoder that is not told what is kept: the noised picture and what is asked for hold it.",
        (
            'unclip edit face.png --mask mask.png --prompt "a sad face with tears" -n 4 --seed 0 --training-free '
            "--grid -o free.png",
        ),
        ("free.png",),
        needs="inpainter",
    ),
    Figure(
        "outpaint",
        "Outpainting, and image to image",
        "Beyond the borders of a picture, where a model of single things sees more of them; and over all of it, from "
        "what some noise leaves.",
        (
            'unclip edit apple.png --extend 64 0 64 0 --prompt "a red apple" --seed 0 -o wider.png',
            'unclip edit apple.png --prompt "a slice of pizza" --strength 0.7 -n 3 --seed 0 --grid -o over.png',
        ),
        ("wider.png", "over.png"),
    ),
    Figure(
        "wording",
        "Mixed and negative prompts",
        "Prior and decoder follow two prompts at once; and are led away from one.",
        (
            'unclip generate "a smiling face" "a smiling cat" --mix 1 1 -n 4 --seed 0 --grid -o catlike.png',
            'unclip generate "a heart" -n 4 --seed 0 --grid -o heart.png',
            'unclip generate "a heart" --negative "a red heart" -n 4 --seed 0 --grid -o not-red.png',
        ),
        ("catlike.png", "heart.png", "not-red.png"),
    ),
    Figure(
        "ablations",
        "What the prior is for",
        "The decoder fed the prior's embedding, then the caption's own in its place, then none (unCLIP 5.1).",
        (
            'unclip generate "a red apple" -n 4 --seed 0 --grid -o prior.png',
            'unclip generate "a red apple" --embedding text -n 4 --seed 0 --grid -o text.png',
            'unclip generate "a red apple" --embedding none -n 4 --seed 0 --grid -o none.png',
        ),
        ("prior.png", "text.png", "none.png"),
    ),
)
