"""The parts of DALL-E (2102.12092), each callable alone: pictures -> codes -> pictures, and what both cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.bound import JointBound, joint_bound
from unclip.models.dalle.sampling import CodeTransformer
from unclip.pipelines.base import ImageInput, check_prompts, inferring, seeds_from
from unclip.pipelines.inference import prepare_for_inference
from unclip.pipelines.runtime import Placement
from unclip.pipelines.unclip.bound_stage import batches_of, several, to_tensor
from unclip.tokenizer import BPETokenizer
from unclip.types import Prompt

# P prompts or pictures, B batch, L text tokens, h w grid of codes, S image size

CHUNK = 16  # pictures that the codec encodes together


class DalleStages(Placement):
    """A tokenizer, a transformer that writes codes, the codec that draws them, and a CLIP that chooses, or none."""

    name: str

    def __init__(
        self, tokenizer: BPETokenizer, codec: ImageCodec, dalle: CodeTransformer, clip: CLIP | None = None
    ) -> None:
        self.tokenizer, self.codec, self.dalle, self.clip = tokenizer, codec, dalle, clip
        self._check_fit()
        for module in self._modules:
            prepare_for_inference(module)

    def networks(self) -> dict[str, nn.Module]:
        """Every network but CLIP."""
        return {"codec": self.codec, "dalle": self.dalle}

    @inferring
    def encode(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Pictures of S x S pixels (PIL, paths, or tensors in [-1, 1]) -> their codes (P, h, w)."""
        x = to_tensor(self._fitting(images)).to(self.device)
        self._use(self.codec)
        return torch.cat([self.codec.encode(x[rows]) for rows in batches_of(len(x), CHUNK)])

    @inferring
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> pictures (B, 3, S, S) in [-1, 1]."""
        self._use(self.codec)
        return self.codec.decode(codes.to(self.device)).float()

    def elbo(
        self,
        images: ImageInput | Sequence[ImageInput],
        captions: Prompt,
        *,
        seed: int | None = None,
    ) -> JointBound:
        """The bound on ln p(x, y) for pictures of S x S pixels and their captions, estimated with one draw of codes.

        Its `bits_per_dim` is what a value of a picture costs at most, the caption included.
        """
        if self.offloaded:
            raise ValueError(
                "the networks are offloaded, but the bound needs both in memory; take it before offload()"
            )
        pictures, captions = self._fitting(images), check_prompts(captions)
        if len(pictures) != len(captions):
            raise ValueError(
                f"{len(captions)} captions for {len(pictures)} pictures; expected one for each"
            )
        generator = torch.Generator(self.device).manual_seed(seeds_from(seed, 1)[0])
        x, tokens = to_tensor(pictures).to(self.device), self._tokens(captions)
        chunks = batches_of(len(x), CHUNK)
        return JointBound.cat(
            [joint_bound(self.dalle, self.codec, x[i], tokens[i], generator) for i in chunks]
        )

    def _tokens(self, prompts: Sequence[str | None]) -> Tensor:
        """(P, L); no prompt is the null, as the empty one is."""
        return self.dalle.tokens(*self.tokenizer([prompt or "" for prompt in prompts]))

    def _fitting(self, images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
        """Pictures as RGB; ValueError unless they are of the size that the codec was made for."""
        pictures, size = several(images), self.codec.image_size
        for picture in pictures:
            if picture.size != (size, size):
                raise ValueError(
                    f"the image is of {picture.width} x {picture.height} pixels; {self.name} takes {size} x {size}: "
                    f"crop and resize it first (--fit on the command line)"
                )
        return pictures

    def _check_fit(self) -> None:
        """Parts that were not trained for one another are refused."""
        if not isinstance(self.codec, ImageCodec):
            raise ValueError(
                f"codec is a {type(self.codec).__name__}; expected an image codec, such as a DVAE"
            )
        config, tokenizer = self.dalle.config, self.tokenizer
        config.check_codec(self.codec.vocab_size, self.codec.grid)
        if (
            tokenizer.vocab_size > config.text_vocab
            or tokenizer.context_length != config.context_length
        ):
            raise ValueError(
                f"the tokenizer gives {tokenizer.context_length} of {tokenizer.vocab_size} tokens; the transformer "
                f"expects {config.context_length} of {config.text_vocab}"
            )
