"""Text or image -> images (unCLIP, 2204.06125)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import Self

from unclip.checkpoints.formats import Bundle, LoadedPrior
from unclip.clip import CLIP
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.embeddings import normalise
from unclip.image_io import open_image, small_images
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.prior import DirectPrior
from unclip.pipelines.base import Pipeline, in_inference_mode, make_schedules
from unclip.pipelines.offload import Offloader, parts
from unclip.pipelines.presets import preset
from unclip.pipelines.provenance import encode_array
from unclip.pipelines.request import (
    Batch,
    Images,
    Mixture,
    PromptBatch,
    Request,
    Seed,
    check_guided,
    check_images,
    check_upsamplers,
    list_images,
    open_images,
    prompt_for_each,
    random_generators,
)
from unclip.pipelines.rerank import BestOf, check_candidates
from unclip.pipelines.runtime import Runtime
from unclip.pipelines.unclip import editing, manipulations
from unclip.pipelines.unclip.adapters import Adapters
from unclip.pipelines.unclip.stages import (
    AnyDecoder,
    AnyPrior,
    AnyUpsampler,
    DecoderStage,
    EncodedPrompts,
    LayoutStage,
    PriorStage,
    TextEncoder,
    UpsamplerStage,
    check_stages,
)
from unclip.types import (
    DType,
    GenerationResult,
    OnStep,
    Prompt,
    StageOptions,
    TextEncoding,
    UnCLIPOptions,
    image_steps,
)

# P prompts, N images of each, B batch (P * N), D embedding width, s and S image sizes


class _EarlierPriors(WeakKeyDictionary[Any, tuple[ScheduleConfig | None, str | None]]):
    """Schedule and source of the priors that a pipeline had.

    Pickled empty, as those priors are left out.
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class UnCLIPPipeline(Pipeline):
    """CLIP, a prior (or none, for variations only), a decoder and any number of upsamplers.

    Every stage can be called separately. `generators` holds one generator for each image, which is
    used in this order: the prior's initial noise for candidate 1, 2, ...; at every stochastic step
    of the prior, noise for candidate 1, 2, ...; the noise of the layout, if the model samples one;
    the initial noise of the decoder and the noise of its steps; the same for each upsampler.
    """

    kind = "unclip"
    required = ("clip", "decoder")
    options: UnCLIPOptions

    def __init__(
        self,
        clip: CLIP,
        prior: AnyPrior | None,
        decoder: AnyDecoder,
        upsamplers: Sequence[AnyUpsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        inpainter: AnyDecoder | None = None,
        layout_prior: LayoutPrior | None = None,
        schedules: Mapping[str, ScheduleConfig] | None = None,
        offloader: Offloader | None = None,
        name: str = "unnamed",
        licence: str = "",
        source: str | None = None,
    ) -> None:
        """schedules: of "prior", "decoder", "upsampler_0", ...; cosine for those left out.

        inpainter: a decoder of the same size that was trained to inpaint; not needed if `decoder`
        was. layout_prior: samples the layouts of `decoder`, which must have that input. offloader:
        already holds the networks. source: the argument of `unclip.load`.
        """
        ups = {f"upsampler_{i}": network for i, network in enumerate(upsamplers)}
        other = None if inpainter is decoder else inpainter
        optional = {"prior": prior, "layout_prior": layout_prior, "decoder": decoder}
        optional |= {"inpainter": other, **ups}
        networks: dict[str, Any] = {key: net for key, net in optional.items() if net is not None}
        super().__init__(Runtime({"clip": clip, **networks}, offloader), name, licence, source)
        diffused = [key for key, net in networks.items() if not isinstance(net, DirectPrior)]
        made = make_schedules(schedules, diffused)

        text_encoder = TextEncoder(clip, self.runtime)
        self.clip, self.text_encoder = clip, text_encoder
        self.prior_stage: PriorStage | None = None
        if prior is not None:
            self.prior_stage = PriorStage(prior, made.get("prior"), text_encoder)
        layouts = None
        if layout_prior is not None:
            layouts = LayoutStage(layout_prior, made["layout_prior"], self.runtime)
        self.decoder_stage = DecoderStage(
            "decoder", decoder, made["decoder"], text_encoder, layouts
        )
        self.inpainter_stage = self.decoder_stage if self.decoder_stage.inpaints else None
        if other is not None:
            self.inpainter_stage = DecoderStage("inpainter", other, made["inpainter"], text_encoder)
        self.upsampler_stages = tuple(
            UpsamplerStage(stage, network, made[stage], self.runtime)
            for stage, network in ups.items()
        )
        self.options = options or UnCLIPOptions(upsamplers=(StageOptions(steps=7),) * len(ups))
        self._earlier_priors = _EarlierPriors()  # for `pipe.prior = network`
        self.adapters = Adapters(self.runtime)
        self._check_compatible(inpainter)
        check_upsamplers(self.options.upsamplers, len(ups))

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, source: str | None = None, offloader: Offloader | None = None
    ) -> UnCLIPPipeline:
        """Make a pipeline from a checkpoint's components; offloaded if an offloader is given."""
        cls.check_bundle(bundle)
        networks = [name for name in bundle.components if name.startswith("upsampler_")]
        names = sorted(networks, key=lambda name: int(name.removeprefix("upsampler_")))

        def component(name: str) -> Any:
            module = bundle.components.get(name)
            if offloader is not None and module is not None:  # before the next one is read
                for part in parts([module]):
                    offloader.add(part)
            return module

        return cls(
            component("clip"),
            component("prior"),
            component("decoder"),
            [component(name) for name in names],
            bundle.options,
            inpainter=component("inpainter"),
            layout_prior=component("layout_prior"),
            schedules=bundle.schedules,
            offloader=offloader,
            name=bundle.name,
            licence=bundle.licence,
            source=source,
        )

    def __call__(
        self,
        prompt: Prompt | Mixture | Sequence[str | Mixture],
        *,
        negative_prompt: Prompt | None = None,
        num_images: int = 1,
        seed: Seed = None,
        options: UnCLIPOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Generate `num_images` images of each prompt; image k has the seed `seed` + k.

        A prompt may be a mixture, {"an apple": 2, "a lemon": 1}: prior and decoder are conditioned
        on all its texts, by their weights. negative_prompt, one for all or one for each, replaces
        the null of guidance. With num_candidates, that number of images is sampled, and those that
        CLIP finds closest to the prompt are kept, the best first, with their scores. on_step is
        called after every step of every batch of at most `batch_size` images.
        """
        prompts, options = PromptBatch.of(prompt, negative_prompt), options or self.options
        self._check_options(options, prompts)
        best, results = None, []
        if num_candidates is not None:
            best = self._best_of(prompts, num_images, num_candidates)
        request = Request(num_candidates or num_images, seed, on_step, batch_size, progress)
        for batch in request.batches(len(prompts), self._num_steps(options, prior=True)):
            part = prompts[batch.prompts]
            with torch.inference_mode():
                encoded = self.text_encoder.encode(part)
                image_emb = self._embed(encoded, batch, options)
                encoded = encoded.repeat_interleave(batch.num_images)
                x = self.decoder_stage.sample(
                    image_emb, encoded, options.decoder, batch.generators, on_step=batch.on_step
                )
                x = self._upsample(x, options.upsamplers, batch.generators, batch.on_step)
            result = self.make_result(x, batch, part.metadata(), options, image_emb=image_emb)
            results.append(result) if best is None else best.add(result)
        return GenerationResult.cat(results) if best is None else best.result()

    def variations(
        self,
        image: Images | None = None,
        *,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        image_emb: Tensor | None = None,
        layout: Tensor | None = None,
        num_images: int = 1,
        seed: Seed = None,
        options: UnCLIPOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Generate images with the meaning of an image, several, or CLIP embeddings (N, D).

        The decoder also reads captions (2.1): `prompt` is one for all images or one for each; None
        = the null of the text. negative_prompt, too, is one for all or one for each; it replaces
        the null of guidance.
        If the model samples layouts, those of variations resemble the images' own, or `layout`
        (N, 3, h, h), as returned by `encode_layout`; with image_emb, there is none unless it is
        given.
        """
        if (image is None) == (image_emb is None):
            raise ValueError("expected either an image or image_emb, one of the two")
        if image_emb is None:
            assert image is not None
            image_emb = self.encode_image(image)
            layout = self.encode_layout(image) if layout is None else layout
        manipulations.check_embeddings(self, image_emb)
        if not image_emb.isfinite().all():
            raise ValueError("image_emb contains infinity or nan; expected finite numbers")
        if layout is not None:
            layout = manipulations.check_layout(self, layout, len(image_emb))
        options = options or self.options
        self._check_options(options)
        emb, results = image_emb.to(self.device, torch.float32), []
        prompts = prompt_for_each(prompt, len(emb))
        negative = prompt_for_each(negative_prompt, len(emb), "negative prompts")
        if negative is not None:
            check_guided({"decoder": options.decoder})
        columns: dict[str, Iterable[str] | None] = {"image_emb": map(encode_array, emb)}
        columns["layout"] = None if layout is None else map(encode_array, layout)
        columns |= {"prompt": prompts, "negative_prompt": negative}
        given = {name: values for name, values in columns.items() if values is not None}
        entries = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
        request = Request(num_images, seed, on_step, batch_size, progress)
        for batch in request.batches(len(emb), self._num_steps(options)):
            rows, n = batch.prompts, batch.num_images
            image_emb = emb[rows].repeat_interleave(n, dim=0)
            like = None if layout is None else layout[rows].repeat_interleave(n, dim=0)
            with torch.inference_mode():
                texts = (x if x is None else x[rows] for x in (prompts, negative))
                encoded = EncodedPrompts.of(self.text_encoder, *texts).repeat_interleave(n)
                x = self.decoder_stage.sample(
                    image_emb,
                    encoded,
                    options.decoder,
                    batch.generators,
                    on_step=batch.on_step,
                    like=like,
                )
                x = self._upsample(x, options.upsamplers, batch.generators, batch.on_step)
            result = self.make_result(x, batch, entries[rows], options, image_emb=image_emb)
            results.append(result)
        return GenerationResult.cat(results)

    # -- stages

    @in_inference_mode
    def encode_text(self, prompts: Prompt) -> TextEncoding:
        """Encode P prompts in float32; texts beyond CLIP's context are cut, with a warning."""
        return self.text_encoder(prompts)

    @in_inference_mode
    def encode_image(self, images: Images) -> Tensor:
        """Compute the CLIP embeddings (N, D) of images, not normalised."""
        self.runtime.use(self.clip)
        if isinstance(images, Tensor):
            return self.clip.encode_image(check_images(images)).float()
        if isinstance(images, Sequence) and any(isinstance(image, Tensor) for image in images):
            return torch.cat([self.encode_image(image) for image in images])
        return self.clip.encode_image(open_images(images)).float()

    def encode_layout(self, images: Images) -> Tensor | None:
        """Return the layouts (N, 3, h, h) of images; None if the model samples no layouts."""
        stage = self.decoder_stage.layout_stage
        if stage is None:
            return None
        opened = [open_image(image) for image in list_images(images)]
        return small_images(opened, stage.network.config.size)

    @in_inference_mode
    def sample_prior(
        self,
        text: TextEncoding,
        *,
        num_images: int = 1,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        candidates: int | None = None,
        on_step: OnStep | None = None,
        negative: TextEncoding | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Sample CLIP image embeddings (P * N, D), N for each of P texts.

        Each is the best of `candidates` by dot product with its text. generators: P * N; None =
        random. negative: 1 or P texts that replace the null of guidance. weights (K, P): mix K
        texts for each prompt; `text` holds the first text of all P prompts, then the second, ...
        """
        prompts = EncodedPrompts(text, negative, weights)
        return self._need_prior().sample(
            prompts,
            options or self.options.prior,
            generators or random_generators(len(text) // prompts.K * num_images),
            num_images=num_images,
            candidates=self.options.prior_candidates if candidates is None else candidates,
            on_step=on_step,
        )

    @in_inference_mode
    def as_image(self, text_emb: Tensor) -> Tensor:
        """Scale text embeddings (N, D) to the length of image embeddings, to decode (5.1)."""
        prior = self._need_prior().network
        self.runtime.use(prior)
        return normalise(text_emb.float()) * prior.emb_norm

    @in_inference_mode
    def decode(
        self,
        image_emb: Tensor | None,
        text: TextEncoding | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
        negative: TextEncoding | None = None,
        weights: Tensor | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Sample images (B, 3, s, s) in [-1, 1] for CLIP image embeddings (B, D) and B texts.

        text: None for no text. image_emb: None to condition on the texts only (unCLIP 5.1).
        negative: B texts that replace the null of guidance. weights (K, B): mix K texts for each
        image; `text` holds the first text of all B images, then the second, ... like: layouts
        (B, 3, h, h) that the sampled ones should resemble, see `encode_layout`.
        """
        return self.decoder_stage.sample(
            image_emb,
            EncodedPrompts(text, negative, weights),
            options or self.options.decoder,
            generators,
            on_step=on_step,
            like=like,
        )

    @in_inference_mode
    def upsample(
        self,
        images: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: Sequence[StageOptions] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Upsample images (B, 3, s, s) in [-1, 1] -> (B, 3, S, S), one stage per options."""
        options = self.options.upsamplers if options is None else options
        check_upsamplers(options, len(self.upsampler_stages))
        size, shape = self.decoder_stage.size, tuple(images.shape)
        if len(shape) != 4 or shape[1:] != (3, size, size):
            raise ValueError(f"images are of shape {shape}; expected (B, 3, {size}, {size})")
        generators = generators or random_generators(len(images))
        return self._upsample(images.to(self.device), options, generators, on_step)

    # -- manipulations (unCLIP 3): functions of a pipeline, as methods

    invert = manipulations.invert
    random_latent = manipulations.random_latent
    imagine = manipulations.imagine
    check_latent = manipulations.check_latent
    reconstruct = manipulations.reconstruct
    vary = manipulations.vary
    interpolate = manipulations.interpolate
    text_diff = manipulations.text_diff

    # -- editing; known pixels are kept bit for bit

    inpaint = editing.inpaint
    outpaint = editing.outpaint
    image_to_image = editing.image_to_image

    # -- networks

    @property
    def prior(self) -> AnyPrior | None:
        """The network from text to image embeddings; None in a model for variations only."""
        return None if self.prior_stage is None else self.prior_stage.network

    @prior.setter
    def prior(self, prior: LoadedPrior | AnyPrior) -> None:
        """Use another prior of the same CLIP, such as `unclip.load_prior` returns.

        A network on its own gets the schedule that it had in this pipeline, or the default. It is
        moved to the device and dtype of the others, and quantized, offloaded or compiled like
        them.
        """
        network = prior.network if isinstance(prior, LoadedPrior) else prior
        if not isinstance(network, AnyPrior):
            kind = type(network).__name__
            raise ValueError(f"prior is a {kind}; expected a prior, as from unclip.load_prior")
        if not isinstance(prior, LoadedPrior):
            prior = LoadedPrior(prior, *self._earlier_priors.get(prior, (None, None)))
        self._check_clip("prior", network.config)
        before = self.prior_stage
        if before is not None:
            diffusion = before.diffusion
            config = None if diffusion is None else diffusion.schedule.config
            self._earlier_priors[before.network] = config, before.source
        self.runtime.add("prior", network)
        schedule = None if prior.schedule is None else Schedule(prior.schedule)
        self.prior_stage = PriorStage(network, schedule, self.text_encoder, prior.source)

    @property
    def decoder(self) -> AnyDecoder:
        return self.decoder_stage.network

    @property
    def inpainter(self) -> AnyDecoder | None:
        """The decoder that inpaints, which may be `decoder`; None if there is none."""
        return None if self.inpainter_stage is None else self.inpainter_stage.network

    @property
    def upsamplers(self) -> tuple[AnyUpsampler, ...]:
        return tuple(stage.network for stage in self.upsampler_stages)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The noise schedule of each diffusion stage."""
        decoder = self.decoder_stage
        stages = [self.prior_stage, decoder, decoder.layout_stage, self.inpainter_stage]
        diffusions = [stage.diffusion for stage in (*stages, *self.upsampler_stages) if stage]
        return {part.name: part.schedule for part in diffusions if part is not None}

    def load_lora(
        self,
        path: str | Path,
        scale: float = 1.0,
        *,
        component: str | None = None,
        merge: bool = False,
    ) -> Self:
        """Apply a LoRA adapter, a folder in peft's layout, to the first network that it fits.

        Several adapters add up. Loading one again changes its scale. component: "prior", "decoder",
        ... merge: add it to the weights, which costs nothing afterwards and cannot be undone.
        ValueError if it fits no network, or if networks are offloaded, compiled or quantized.
        """
        self.adapters.load(path, scale, component, merge)
        return self

    def unload_lora(self, path: str | Path | None = None) -> Self:
        """Remove one adapter, or all, so that outputs are as before loading."""
        self.adapters.unload(path)
        return self

    def preset(self, name: str) -> UnCLIPOptions:
        """Return options by name: "exact", the model's own, or "fast", cheaper and approximate."""
        return preset(name, self.options, [up.separate_last for up in self.upsampler_stages])

    def describe(self, options: UnCLIPOptions) -> dict[str, Any]:
        """Return the metadata about the model that every image gets."""
        source = None if self.prior_stage is None else self.prior_stage.source
        prior = {} if source is None else {"prior_model": source}
        adapters = self.adapters.metadata() if self.adapters.loaded else {}
        return {**super().describe(options), **prior, **adapters}

    def save_pretrained(self, folder: str | Path, dtype: DType | None = None) -> None:
        """Write a model folder; see `Pipeline.save_pretrained`. Adapters must be merged."""
        self.adapters.check_saveable()
        super().save_pretrained(folder, dtype)

    def prior_steps(self, options: StageOptions) -> int:
        """Return how often the prior calls `on_step`; options matter for diffusion only."""
        return self._need_prior().steps(options)

    # -- helpers

    def _embed(
        self, prompts: EncodedPrompts, batch: Batch, options: UnCLIPOptions
    ) -> Tensor | None:
        """Return image embeddings (B, D) of the kind that the options ask for, or None."""
        if options.embedding == "none":
            return None
        if options.embedding == "text":
            return self.as_image(prompts.emb).repeat_interleave(batch.num_images, dim=0)
        return self._need_prior().sample(
            prompts,
            options.prior,
            batch.generators,
            num_images=batch.num_images,
            candidates=options.prior_candidates,
            on_step=batch.on_step,
        )

    def _upsample(
        self,
        x: Tensor,
        options: Sequence[StageOptions],
        generators: Sequence[torch.Generator],
        on_step: OnStep | None,
    ) -> Tensor:
        for stage, stage_options in zip(self.upsampler_stages, options, strict=False):
            x = stage.sample(x, stage_options, generators, on_step)
        return x

    def _best_of(self, prompts: PromptBatch, num_images: int, num_candidates: int) -> BestOf:
        check_candidates(num_images, num_candidates)
        text_emb = EncodedPrompts(self.encode_text(prompts.texts), weights=prompts.weights).emb
        return BestOf(self.encode_image, text_emb, num_images, num_candidates)

    def _num_steps(self, options: UnCLIPOptions, prior: bool = False) -> int:
        """Return the sampling steps of a batch; prior: include those of the prior."""
        steps = sum(image_steps(options))
        if prior and options.embedding == "prior":
            steps += self._need_prior().steps(options.prior)
        return steps

    def _need_prior(self) -> PriorStage:
        if self.prior_stage is None:
            raise ValueError("the model has no prior to generate from text; use variations(image)")
        return self.prior_stage

    def _check_options(self, options: UnCLIPOptions, prompts: PromptBatch | None = None) -> None:
        """Raise ValueError unless the options are valid; prompts: None for images without one."""
        check_stages(self, options, of_prompts=prompts is not None)
        if prompts is not None:
            prompts.check(options)
            if options.embedding != "none":
                self._need_prior()

    def _check_compatible(self, inpainter: AnyDecoder | None) -> None:
        """Raise ValueError for networks that were not trained for each other."""
        if self.prior is not None:
            self._check_clip("prior", self.prior.config)
        self._check_clip("decoder", self.decoder.config)
        size, layouts = self.decoder_stage.size, self.decoder_stage.layout_stage
        if layouts is not None:
            if not isinstance(self.decoder, Decoder) or self.decoder.layout is None:
                raise ValueError("layout_prior was given, but the decoder takes no layout")
            self._check_clip("layout_prior", layouts.network.config)
        if inpainter is not None:
            self._check_clip("inpainter", inpainter.config)
            stage = self.inpainter_stage
            if stage is None or not stage.inpaints or stage.size != size:
                kind, side = type(inpainter).__name__, inpainter.config.image_size
                raise ValueError(
                    f"inpainter is a {kind} of {side} px; expected a decoder of {size} px that "
                    f"was trained to inpaint"
                )
        for stage in self.upsampler_stages:
            low = stage.network.config.low_size
            if low != size:
                name = stage.diffusion.name
                raise ValueError(f"{name} takes images of {low} px, but gets {size} px")
            size = stage.size

    def _check_clip(self, stage: str, config: Any) -> None:
        clip = self.clip
        if config.emb_dim != clip.emb_dim:
            raise ValueError(f"{stage} has emb_dim {config.emb_dim}, but CLIP has {clip.emb_dim}")
        width = config.text_width
        if width not in (clip.text_width, None):  # None: it reads no captions
            raise ValueError(f"{stage} has text_width {width}, but CLIP has {clip.text_width}")
