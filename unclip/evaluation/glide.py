"""Evaluation of a GLIDE: the distances and the CLIP score of its final images."""

from __future__ import annotations

from unclip.evaluation.generator import ImageGenerator
from unclip.pipelines.glide import GLIDEPipeline
from unclip.types import GLIDEOptions


class GLIDEGenerator(ImageGenerator):
    """A GLIDE pipeline; its images have their full size."""

    pipe: GLIDEPipeline
    options: GLIDEOptions

    @property
    def size(self) -> int:
        return self.pipe.stages[len(self.options.upsamplers)].network.config.image_size
