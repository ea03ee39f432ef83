"""unCLIP (2204.06125) for diffusers, as written by `unclip convert MODEL FOLDER --to diffusers`.

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)

Text -> CLIP text encoder -> prior -> layout prior, if there is one -> decoder -> upsamplers ->
images. The schedulers can be replaced by others of diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Generator, Tensor


class UnCLIPFolderPipeline(DiffusionPipeline):
    """Generates images from prompts; `options` holds steps and guidance of each stage."""

    _optional_components = [
        "null_text",
        "layout_prior",
        "layout_prior_scheduler",
        "upsampler_0",
        "upsampler_0_scheduler",
        "upsampler_1",
        "upsampler_1_scheduler",
    ]

    def __init__(
        self,
        text_encoder: Any,
        tokenizer: Any,
        prior: Any,
        prior_scheduler: Any,
        decoder: Any,
        decoder_scheduler: Any,
        null_text: Any = None,
        layout_prior: Any = None,
        layout_prior_scheduler: Any = None,
        upsampler_0: Any = None,
        upsampler_0_scheduler: Any = None,
        upsampler_1: Any = None,
        upsampler_1_scheduler: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prior=prior,
            prior_scheduler=prior_scheduler,
            decoder=decoder,
            decoder_scheduler=decoder_scheduler,
            null_text=null_text,
            layout_prior=layout_prior,
            layout_prior_scheduler=layout_prior_scheduler,
            upsampler_0=upsampler_0,
            upsampler_0_scheduler=upsampler_0_scheduler,
            upsampler_1=upsampler_1,
            upsampler_1_scheduler=upsampler_1_scheduler,
        )
        self.register_to_config(options=options)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        decoder_num_inference_steps: int | None = None,
        decoder_guidance_scale: float | None = None,
        upsampler_num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate images; by default with the steps and guidance scales of the model.

        generator: one, or one for each image. output_type: "pil", "np" or "pt".
        """
        options = self.config.options
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = [text for text in prompts for _ in range(num_images_per_prompt)]
        generators = [generator] * len(captions) if _is_one(generator) else list(generator)
        if len(generators) != len(captions):
            given = f"{len(generators)} generators for {len(captions)} images"
            raise ValueError(f"{given}; expected one for each, or one for all")

        text = self._encode(captions)
        guidance = _default(prior_guidance_scale, options["prior"]["guidance"])
        steps = prior_num_inference_steps or options["prior"]["steps"]
        emb = self._sample_prior(text, generators, steps, guidance)

        guidance = _default(decoder_guidance_scale, options["decoder"]["guidance"])
        layout = None if self.layout_prior is None else self._sample_layout(emb, text, generators)
        contexts = [self.decoder.condition(emb, *text, layout)]
        if guidance != 1:
            contexts.append(self.decoder.condition(None, *self._encode([""] * len(captions))))
        size = self.decoder.config.image_size
        noise = _noise((3, size, size), generators, self._execution_device)
        steps = decoder_num_inference_steps or options["decoder"]["steps"]
        predict = _guided(self.decoder, contexts, guidance)
        x = self._sample(predict, noise, self.decoder_scheduler, steps).clamp(-1, 1)

        for i, stage in enumerate(options["upsamplers"]):
            upsampler = getattr(self, f"upsampler_{i}")
            scheduler = getattr(self, f"upsampler_{i}_scheduler")
            size = upsampler.config.high_size
            noise = _noise((3, size, size), generators, self._execution_device)
            predict = _guided(upsampler, [upsampler.condition(x)], 1.0)
            steps = upsampler_num_inference_steps or stage["steps"]
            x = self._sample(predict, noise, scheduler, steps).clamp(-1, 1)

        images = _convert(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings (B, D), states (B, L, W) and masks (B, L) of texts."""
        batch = self.tokenizer(
            [" ".join(text.split()) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self._execution_device)
        output = self.text_encoder(batch.input_ids)
        return output.text_embeds, output.last_hidden_state, batch.attention_mask.bool()

    def _sample_prior(
        self, text: tuple[Tensor, ...], generators: list[Any], steps: int, guidance: float
    ) -> Tensor:
        """Sample image embeddings (B, D); of several candidates, keep that closest to the text."""
        n, dtype = self.config.options["prior_candidates"], self.prior.dtype
        contexts, B = [text], len(text[0]) * n
        if guidance != 1:
            length = text[2].shape[1]
            learned = self.null_text is not None
            null = self.null_text(len(text[0]), length) if learned else None
            contexts.append(null or self._encode([""] * len(text[0])))
        repeated = [tuple(x.repeat_interleave(n, dim=0) for x in one) for one in contexts]

        def denoise(x: Tensor, t: Tensor, emb: Tensor, states: Tensor, mask: Tensor) -> Tensor:
            args = x.to(dtype), t, emb.to(dtype), states.to(dtype), mask
            return self.prior(*args).predicted_image_embedding

        width, device = text[0].shape[1], text[0].device
        noise = _noise((width,), [g for g in generators for _ in range(n)], device)
        predict = _guided(denoise, repeated, guidance)
        emb = self._sample(predict, noise, self.prior_scheduler, steps)
        emb = self.prior.post_process_latents(emb).view(B // n, n, -1)
        best = torch.einsum("bnd,bd->bn", emb, text[0].to(emb)).argmax(dim=1)
        return emb[torch.arange(len(emb), device=emb.device), best]

    def _sample_layout(
        self, emb: Tensor, text: tuple[Tensor, ...], generators: list[Any]
    ) -> Tensor:
        """Sample layouts (B, 3, h, h) in [-1, 1] for image embeddings (B, D)."""
        network, options = self.layout_prior, self.config.options["layout_prior"]
        contexts = [network.condition(emb, *text)]
        if options["guidance"] != 1:
            contexts.append(network.null(len(emb)))
        noise = _noise((network.config.components,), generators, emb.device)
        predict = _guided(network, contexts, options["guidance"])
        scheduler = self.layout_prior_scheduler
        return network.decode(self._sample(predict, noise, scheduler, options["steps"]))

    def _sample(
        self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, scheduler: Any, steps: int
    ) -> Tensor:
        """Sample from noise in float32."""
        scheduler.set_timesteps(steps, device=x.device)
        arguments = inspect.signature(scheduler.step).parameters
        # DDIM derives the noise again from an estimate that was clipped.
        clipped = (
            {"use_clipped_model_output": True} if "use_clipped_model_output" in arguments else {}
        )
        x = x * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            output = predict(scheduler.scale_model_input(x, t), t.expand(len(x)))
            output = output[:, : x.shape[1]].float()  # without a learned variance
            x = scheduler.step(output, t, x, **clipped).prev_sample
        return x


def _guided(
    network: Callable[..., Tensor], contexts: list[tuple[Tensor, ...]], guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network as a function of x and t; of two contexts, the second is the null."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        outputs = [network(x, t, *context).float() for context in contexts]
        if len(outputs) == 1:
            return outputs[0]
        cond, null = outputs
        return null + guidance * (cond - null)

    return predict


def _noise(shape: tuple[int, ...], generators: list[Any], device: Any) -> Tensor:
    """Sample normal noise, a row from each generator, in float32."""
    rows = [
        torch.randn(1, *shape, generator=g, device=None if g is None else g.device)
        for g in generators
    ]
    return torch.cat([row.to(device) for row in rows])


def _is_one(generator: Any) -> bool:
    return generator is None or isinstance(generator, Generator)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _convert(x: Tensor, output_type: str) -> Any:
    """Convert images (B, 3, S, S) in [-1, 1]."""
    if output_type == "pt":
        return x / 2 + 0.5
    pixels = (x * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(pixels / 255) if output_type == "pil" else pixels / 255
