"""Old module paths and names that keep working for one release, with a DeprecationWarning.

`install()` adds a finder that serves old module paths and gives modules with renamed members a
`__getattr__`. `renamed_fields` does the same for the fields of a dataclass.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar, cast

T = TypeVar("T")


def _table(text: str) -> dict[str, str]:
    pairs = (line.split() for line in text.strip().splitlines())
    return {f"unclip.{old}": f"unclip.{new}" for old, new in pairs}


# Old module path, new module path. Names that are not in NAMES are looked up in the new module.
MODULES = _table("""
cli cli.main
pictures image_io
resize image_io
latents embeddings
checkpoints.catalogue checkpoints.folders
checkpoints.codecs checkpoints.registry
checkpoints.contents checkpoints.summary
checkpoints.priors checkpoints.registry
checkpoints.diffusers checkpoints.diffusers.load
checkpoints.diffusers_configs checkpoints.diffusers.configs
checkpoints.diffusers_export checkpoints.diffusers.export
checkpoints.diffusers_layout checkpoints.diffusers.layout
checkpoints.diffusers_names checkpoints.diffusers.names
checkpoints.dalle2_pytorch checkpoints.dalle2_pytorch.load
checkpoints.dalle2_pytorch_config checkpoints.dalle2_pytorch.configs
checkpoints.dalle2_pytorch_files checkpoints.dalle2_pytorch.files
checkpoints.dalle2_pytorch_names checkpoints.dalle2_pytorch.names
checkpoints.transformers_clip checkpoints.transformers.clip
checkpoints.transformers_tokenizer checkpoints.transformers.tokenizer
checkpoints.openai_clip checkpoints.openai.clip
checkpoints.openai_dvae checkpoints.openai.dvae
models.prior models.unclip.prior
models.text_prior models.unclip.prior
models.ar_prior models.unclip.ar_prior
models.one_shot_prior models.unclip.one_shot_prior
models.decoder models.unclip.decoder
models.upsampler models.unclip.upsampler
models.layout models.unclip.decoder
models.embedding_stats models.unclip.prior
models.embedding_codes models.unclip.ar_prior
models.dalle models.dalle.transformer
models.dalle_attention models.dalle.attention
models.dalle_cache models.dalle.cache
models.dalle_sampling models.dalle.sampling
models.dalle_bound models.dalle.bound
models.dalle_layers models.dalle.layers
models.dalle_rotary models.dalle.layers
models.dalle_streams models.dalle.spans
models.codec models.codecs.codec
models.dvae models.codecs.dvae
models.vqvae models.codecs.vqvae
models.vqgan models.codecs.vqgan
models.vae models.codecs.vae
models.quantizers models.codecs.quantizers
models.discriminator models.codecs.discriminator
models.plain_dvae models.published.plain_dvae
models.cross_attention_unet models.published.cross_attention_unet
models.cross_attention_decoder models.published.cross_attention_decoder
models.relative_prior models.published.relative_prior
models.glide models.published.glide
models.bart_dalle models.published.bart_dalle
models.packing models.cpu.packing
models.int8 models.cpu.int8
pipelines.placement pipelines.runtime
pipelines.compiling pipelines.compilation
pipelines.settling pipelines.inference
pipelines.recipes pipelines.provenance
pipelines.unclip pipelines.unclip.pipeline
pipelines.stages pipelines.unclip.stages
pipelines.networks pipelines.unclip.stages
pipelines.runs pipelines.unclip.stages
pipelines.manipulation pipelines.unclip.manipulations
pipelines.editing pipelines.unclip.editing
pipelines.latent pipelines.unclip.latent
pipelines.wording pipelines.request
pipelines.probing pipelines.unclip.probing
pipelines.dalle pipelines.dalle.pipeline
pipelines.dalle_stages pipelines.dalle.pipeline
pipelines.command_line cli.arguments
pipelines.arguments cli.arguments
pipelines.commands cli.manipulate
pipelines.from_pictures cli.manipulate
evaluation.commands cli.evaluate
evaluation.codec_command cli.evaluate
evaluation.priors_command cli.evaluate
evaluation.drift evaluation.approximations
evaluation.manipulation evaluation.manipulations
evaluation.harness evaluation.base
evaluation.unclip_harness evaluation.unclip
evaluation.dalle_harness evaluation.dalle
evaluation.drawing evaluation.base
""")

# Renamed members: old path, new path.
NAMES = _table("""
checkpoints.catalogue.ComponentInfo checkpoints.summary.ComponentInfo
checkpoints.catalogue.ModelInfo checkpoints.summary.ModelInfo
checkpoints.catalogue.describe checkpoints.summary.describe
checkpoints.catalogue.lenders checkpoints.folders.shared_from
checkpoints.catalogue.summary checkpoints.summary.summary
checkpoints.contents.Contents checkpoints.formats.Format
checkpoints.contents.foreign_summary checkpoints.summary.summary
checkpoints.dalle2_pytorch_files.only checkpoints.dalle2_pytorch.files.only_checkpoint
checkpoints.diffusers_layout.licence checkpoints.folders.card_licence
checkpoints.diffusers_layout.name checkpoints.folders.folder_name
checkpoints.diffusers_layout.weight_files checkpoints.folders.weight_files
checkpoints.diffusers_layout.weights_of checkpoints.folders.weights_index
checkpoints.folders.read_weights checkpoints.renaming.read_weights
checkpoints.formats.FORMATS checkpoints.registry.MODELS
checkpoints.formats.load_any checkpoints.registry.load_any
checkpoints.hub.wanted checkpoints.hub.select
checkpoints.karlo.only checkpoints.folders.only_file
checkpoints.min_dalle.states checkpoints.min_dalle.probe
checkpoints.openai_dvae.sizes checkpoints.openai.dvae.infer_config
checkpoints.priors.PriorFormat checkpoints.formats.Format
checkpoints.renaming.to_here checkpoints.renaming.import_state
checkpoints.renaming.to_there checkpoints.renaming.export_state
checkpoints.renaming.under checkpoints.renaming.prefixed
checkpoints.store.load_kind checkpoints.store.load_as
checkpoints.taming.sizes checkpoints.taming.infer_config
clip.NO_TOWER clip.MINIMAL_VISION
config.Place config.KeyPath
data.codes.CodeDataset data.precomputed.CodeDataset
data.loader.PictureReader data.loader.ImageReader
data.loader.place data.loader.shift_and_scale
data.precomputed.PartWriter data.precompute.PartWriter
data.precomputed.caption_rows data.precompute.caption_rows
data.precomputed.parquet data.precomputed.import_parquet
data.precomputed.precompute data.precompute.precompute
data.samples.square data.samples.resize_center_crop
data.shards.PICTURES data.shards.IMAGES
diffusion.guidance.guide diffusion.samplers.guide
diffusion.guidance.threshold diffusion.samplers.threshold
diffusion.samplers.make_scheduler diffusion.schedulers.make_scheduler
diffusion.samplers.scheduler_betas diffusion.schedulers.scheduler_betas
diffusion.samplers.timesteps diffusion.samplers.sampling_timesteps
evaluation.codec.high_band evaluation.metrics.high_frequency_energy
evaluation.drawing.DalleDrawer evaluation.dalle.DalleGenerator
evaluation.drawing.Drawer evaluation.base.ImageGenerator
evaluation.drawing.Drawn evaluation.base.Samples
evaluation.drawing.Imagined evaluation.unclip.PredictedEmbeddings
evaluation.drawing.UnCLIPDrawer evaluation.unclip.UnCLIPGenerator
evaluation.drift.Drift evaluation.approximations.ApproximationError
evaluation.manipulation.Manipulations evaluation.manipulations.ManipulationEvaluation
evaluation.metrics.agreement evaluation.metrics.cosine_gap
evaluation.pairs.canonical evaluation.pairs.canonical_caption
evaluation.report.markdown evaluation.report.markdown_table
evaluation.report.plain evaluation.report.plain_table
evaluation.report.rows evaluation.report.evaluation_rows
models.bart_dalle.Texts models.published.bart_dalle.EncodedTexts
models.dalle.TextPrefix models.dalle.transformer.DALLEPrefix
models.dalle_cache.Place models.dalle.cache.CacheSlot
models.dalle_cache.Reading models.dalle.cache.CacheLayout
models.dalle_cache.reading models.dalle.cache.cache_layout
models.dalle_sampling.AnyDALLE models.dalle.code_transformer.CodeTransformer
models.dalle_sampling.draw_code models.dalle.sampling.sample_code
models.dalle_streams.FromStart models.dalle.spans.FirstTokens
models.dalle_streams.Run models.dalle.spans.Span
models.decoder.known_part models.unclip.decoder.masked_image
models.dvae.pixels_of models.codecs.dvae.logits_to_pixels
models.int8.Int8Weight models.cpu.int8.Int8Layer
models.layers.Linear models.cpu.kernels.FewRowsLinear
models.packing.Packed models.cpu.packing.PackedLayer
models.text_prior.OnDraw models.unclip.prior.OnPrediction
models.text_prior.TextPrefix models.layers.KeyValues
models.unet.double models.unet.upsample_nearest
pictures.FASTEST image_io.MAX_FPS
pictures.MOST_TEXT image_io.MAX_METADATA
pictures.SLOWEST image_io.MIN_FPS
pictures.TYPES image_io.FIELD_TYPES
pictures.lacks_picture image_io.lacks_image
pictures.open_picture image_io.open_image
pipelines.arguments.Argument cli.arguments.SamplingFlag
pipelines.arguments.add_arguments cli.arguments.add_sampling
pipelines.base.Picture pipelines.request.ImageInput
diffusion.guidance.guide diffusion.samplers.guide
diffusion.guidance.threshold diffusion.samplers.threshold
diffusion.samplers.make_scheduler diffusion.schedulers.make_scheduler
diffusion.samplers.scheduler_betas diffusion.schedulers.scheduler_betas
diffusion.samplers.timesteps diffusion.samplers.sampling_timesteps
models.text_prior.OnDraw models.unclip.prior.OnPrediction
models.text_prior.TextPrefix models.layers.KeyValues
pipelines.base.check_count pipelines.request.check_count
pipelines.base.check_images pipelines.request.check_images
pipelines.base.check_prompts pipelines.request.check_prompts
pipelines.base.default_dtype pipelines.runtime.default_dtype
pipelines.base.find_device pipelines.runtime.find_device
pipelines.base.generators_from pipelines.request.generators_from
pipelines.base.progress_bar pipelines.request.progress_bar
pipelines.base.random_generators pipelines.request.random_generators
pipelines.base.redraw pipelines.provenance.regenerate
pipelines.base.seeds_from pipelines.request.seeds_from
pipelines.base.split_batches pipelines.request.split_batches
pipelines.base.to_pil image_io.to_pil
pipelines.dalle_stages.DalleStages pipelines.dalle.pipeline.DallePipeline
pipelines.latent.places_on_path pipelines.unclip.latent.path_positions
pipelines.networks.UnCLIPNetworks pipelines.unclip.pipeline.UnCLIPPipeline
pipelines.placement.Placement pipelines.base.Pipeline
pipelines.recipes.decode_picture pipelines.provenance.decode_image
pipelines.recipes.encode_picture pipelines.provenance.encode_image
pipelines.runs.StageRun pipelines.unclip.stages.BoundStage
pipelines.runs.fit image_io.fit
pipelines.runs.several pipelines.request.open_images
pipelines.runs.to_tensor image_io.to_tensor
pipelines.runs.unopened pipelines.request.list_images
pipelines.stages.UnCLIPStages pipelines.unclip.pipeline.UnCLIPPipeline
pipelines.command_line.add_placement cli.arguments.add_runtime
pipelines.command_line.check_file cli.output.check_file
pipelines.command_line.check_output cli.output.check_output
pipelines.command_line.check_writable cli.output.check_json
pipelines.command_line.columns_of cli.output.columns_of
pipelines.command_line.load_model cli.loading.load_model
pipelines.command_line.load_named cli.loading.load_named
pipelines.command_line.read_prompts cli.arguments.prompts_file
pipelines.command_line.share cli.arguments.fraction
pipelines.command_line.slug cli.output.slug
pipelines.command_line.write cli.output.write_images
pipelines.command_line.write_figures cli.output.write_json
pipelines.offload.Residency pipelines.offload.Offloader
pipelines.recipes.picture_source pipelines.provenance.image_source
pipelines.settling.settled pipelines.inference.prepare_for_inference
pipelines.wording.Wording pipelines.request.PromptBatch
tokenizer.warn_cut tokenizer.warn_truncated
training.codec.JudgedCodec training.codec.AdversarialCodec
training.frozen.load_clip training.initialization.load_clip
training.inpainting.cut_out training.inpainting.foreground_alpha
training.losses.DropConfig training.losses.ConditionDropout
training.losses.mixed training.losses.mix_embeddings
training.losses.noised training.losses.add_embedding_noise
training.losses.resized training.losses.resize_square
training.processes.this_process training.launch.this_process
training.random_state.random_state training.checkpoints.random_state
training.random_state.set_random_state training.checkpoints.set_random_state
training.run_state.MAY_CHANGE training.checkpoints.MUTABLE_SETTINGS
training.run_state.RunState training.checkpoints.RunState
training.run_state.load_weights training.initialization.load_weights
training.run_state.read_weights training.initialization.read_weights
training.stop.StopRequest training.launch.StopRequest
training.vocabulary.make_tokenizer training.initialization.make_tokenizer
training.warm_start.warm_start training.initialization.warm_start
""")

_CHANGED = {*MODULES, *(name.rpartition(".")[0] for name in NAMES)}


def install() -> None:
    """Serve old module paths and names; `unclip/__init__.py` calls this once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def lookup(module: str, name: str) -> Any:
    """Return the object that used to be `module.name`, with a warning; AttributeError if none."""
    new = NAMES.get(f"{module}.{name}")
    if new is None and module in MODULES and not name.startswith("__"):
        submodules = getattr(sys.modules[module], "__path__", [])
        if PathFinder.find_spec(f"{module}.{name}", submodules) is None:
            new = f"{MODULES[module]}.{name}"
    if new is not None:
        owner, _, attribute = new.rpartition(".")
        try:
            value = getattr(import_module(owner), attribute)
        except AttributeError:
            pass
        else:
            _warn(f"{module}.{name}", new)
            return value
    raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)


class _Finder:
    # Without the base classes of importlib.abc, whose import would double that of `unclip`.
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in _CHANGED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:  # the module has moved
            if fullname in MODULES:
                _warn(fullname, MODULES[fullname])
            return ModuleSpec(fullname, cast(Any, self))
        if spec.loader is not None:  # the module exists, but some of its names have moved
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = functools.partial(lookup, module.__name__)


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    module.__getattr__ = functools.partial(lookup, module.__name__)


def renamed_fields(**new_names: str) -> Callable[[type[T]], type[T]]:
    """Accept the old names of a dataclass's fields: `@renamed_fields(old="new")`.

    The constructor and attribute access warn. Files with the old keys load silently.
    """

    def wrap(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in new_names.keys() & kwargs.keys():
                _warn(f"{cls.__name__}({old}=...)", f"{cls.__name__}({new_names[old]}=...)")
            init(self, *args, **{new_names.get(key, key): x for key, x in kwargs.items()})

        def schema(source: Any, handler: Any) -> Any:
            own = handler(source)
            old_names = {new: old for old, new in new_names.items()}
            # Changed in place: the definition is shared by all places that refer to the class.
            for field in handler.resolve_ref_schema(own)["schema"]["fields"]:
                if field["name"] in old_names:
                    field["validation_alias"] = [[field["name"]], [old_names[field["name"]]]]
            return own

        def old_attribute(old: str, new: str) -> property:
            def get(self: Any) -> Any:
                _warn(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
                return getattr(self, new)

            return property(get)

        cls.__init__ = __init__
        cls.__get_pydantic_core_schema__ = staticmethod(schema)  # type: ignore[attr-defined]
        for old, new in new_names.items():
            setattr(cls, old, old_attribute(old, new))
        return cls

    return wrap


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release; use {new}",
        DeprecationWarning,
        stacklevel=3,
    )
