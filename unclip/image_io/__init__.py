"""Reading and writing image files, with the metadata that is needed to generate an image again."""

# ruff: noqa: F401

from unclip.image_io.figures import cell, check_animation, figure, find_ffmpeg, grid, save_animation
from unclip.image_io.metadata import METADATA_KEY, lacks_image, read_metadata, read_source_type
from unclip.image_io.reading import FORMATS, ImageSource, identify, open_image, open_mask
from unclip.image_io.tensors import (
    RESIZE_RULE,
    fit,
    from_uint8,
    resize,
    small_images,
    to_pil,
    to_tensor,
)
from unclip.image_io.writing import WRITTEN, encode_image, image_name, save_image, save_png, slug
