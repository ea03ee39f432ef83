"""Evaluation of what a model has learned, and benchmarks of its speed and memory."""

PARTS = {  # of an evaluation, by kind of model
    "unclip": ("prior", "images", "features", "decoder", "upsampler", "repeatable"),
    "dalle": ("images", "features", "candidates", "codec", "bound", "repeatable"),
    "glide": ("features", "repeatable"),
}
CLIP_PARTS = ("prior", "images", "candidates")  # of these, the parts that need the model's CLIP
MANIPULATION_PARTS = (
    *("reconstruction", "variations", "interpolation"),
    *("text_diff", "pca", "inpainting"),
)
STAGES = {  # timed by a benchmark, by kind of model
    "unclip": ("text", "prior", "decoder", "upsampler"),
    "dalle": ("text", "codes", "codec"),
}
