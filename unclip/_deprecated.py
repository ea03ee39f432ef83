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
    """Parse lines "OLD NEW: name old_name=new_name ..."; "." is the package itself."""
    table = {}
    for line in text.strip().splitlines():
        owners, _, names = line.partition(": ")
        old, new = (f"unclip.{owner}".rstrip(".") for owner in owners.split())
        for name in names.split():
            table[f"{old}.{name.partition('=')[0]}"] = f"{new}.{name.rpartition('=')[2]}"
    return table


# Old and new package of modules. Names that are not in NAMES are looked up in the new module.
MODULES = _table("""
. cli: cli=main
. .: pictures=image_io resize=image_io latents=embeddings
checkpoints checkpoints: catalogue=folders codecs=registry contents=summary priors=registry
checkpoints checkpoints.diffusers: diffusers=load diffusers_configs=configs diffusers_export=export
checkpoints checkpoints.diffusers: diffusers_layout=layout diffusers_names=names
checkpoints checkpoints.dalle2_pytorch: dalle2_pytorch=load dalle2_pytorch_config=configs
checkpoints checkpoints.dalle2_pytorch: dalle2_pytorch_files=files dalle2_pytorch_names=names
checkpoints checkpoints.transformers: transformers_clip=clip transformers_tokenizer=tokenizer
checkpoints checkpoints.openai: openai_clip=clip openai_dvae=dvae
models models.unclip: prior text_prior=prior ar_prior one_shot_prior decoder upsampler
models models.unclip: layout=decoder embedding_stats=prior embedding_codes=ar_prior
models models.dalle: dalle=transformer dalle_attention=attention dalle_cache=cache
models models.dalle: dalle_sampling=sampling dalle_bound=bound dalle_layers=layers
models models.dalle: dalle_rotary=layers dalle_streams=spans
models models.codecs: codec dvae vqvae vqgan vae quantizers discriminator
models models.published: plain_dvae cross_attention_unet cross_attention_decoder relative_prior
models models.published: glide bart_dalle
models models.cpu: packing int8
pipelines pipelines: placement=runtime compiling=compilation settling=inference recipes=provenance
pipelines pipelines: wording=request
pipelines pipelines.unclip: unclip=pipeline stages networks=stages runs=stages
pipelines pipelines.unclip: manipulation=manipulations editing latent probing
pipelines pipelines.dalle: dalle=pipeline dalle_stages=pipeline
pipelines cli: command_line=arguments arguments commands=manipulate from_pictures=manipulate
evaluation cli: commands=evaluate codec_command=evaluate priors_command=evaluate
evaluation evaluation: drift=approximations manipulation=manipulations harness=base
evaluation evaluation: unclip_harness=unclip dalle_harness=dalle drawing=base
""")

# Old and new module of renamed members.
NAMES = _table("""
checkpoints.catalogue checkpoints.summary: ComponentInfo ModelInfo describe summary
checkpoints.catalogue checkpoints.folders: lenders=shared_from
checkpoints.contents checkpoints.formats: Contents=Format
checkpoints.contents checkpoints.summary: foreign_summary=summary
checkpoints.dalle2_pytorch_files checkpoints.dalle2_pytorch.files: only=only_checkpoint
checkpoints.diffusers_layout checkpoints.folders: licence=card_licence name=folder_name weight_files
checkpoints.diffusers_layout checkpoints.folders: weights_of=weights_index
checkpoints.folders checkpoints.renaming: read_weights
checkpoints.formats checkpoints.registry: FORMATS=MODELS load_any
checkpoints.hub checkpoints.hub: wanted=select
checkpoints.karlo checkpoints.folders: only=only_file
checkpoints.min_dalle checkpoints.min_dalle: states=probe
checkpoints.openai_dvae checkpoints.openai.dvae: sizes=infer_config
checkpoints.priors checkpoints.formats: PriorFormat=Format
checkpoints.renaming checkpoints.renaming: to_here=import_state to_there=export_state under=prefixed
checkpoints.store checkpoints.store: load_kind=load_as
checkpoints.taming checkpoints.taming: sizes=infer_config
clip clip: NO_TOWER=MINIMAL_VISION
config config: Place=KeyPath
data.codes data.precomputed: CodeDataset
data.loader data.loader: PictureReader=ImageReader place=shift_and_scale
data.precomputed data.precompute: caption_rows precompute
data.precomputed data.parts: PartWriter
data.precomputed data.precomputed: parquet=import_parquet
data.samples data.samples: square=resize_center_crop
diffusion.guidance diffusion.samplers: guide threshold
diffusion.samplers diffusion.schedulers: make_scheduler scheduler_betas
diffusion.samplers diffusion.samplers: timesteps=sampling_timesteps
evaluation.codec evaluation.metrics: high_band=high_frequency_energy
evaluation.drawing evaluation.dalle: DalleDrawer=DalleGenerator
evaluation.drawing evaluation.base: Drawer=ImageGenerator Drawn=Samples
evaluation.drawing evaluation.unclip: Imagined=PredictedEmbeddings UnCLIPDrawer=UnCLIPGenerator
evaluation.drift evaluation.approximations: Drift=ApproximationError
evaluation.manipulation evaluation.manipulations: Manipulations=ManipulationEvaluation
evaluation.metrics evaluation.metrics: agreement=cosine_gap
evaluation.pairs evaluation.pairs: canonical=canonical_caption
evaluation.report evaluation.report: markdown=markdown_table plain=plain_table rows=evaluation_rows
models.bart_dalle models.published.bart_dalle: Texts=EncodedTexts
models.dalle models.dalle.transformer: TextPrefix=DALLEPrefix
models.dalle_cache models.dalle.cache: Place=CacheSlot Reading=CacheLayout reading=cache_layout
models.dalle_sampling models.dalle.code_transformer: AnyDALLE=CodeTransformer
models.dalle_sampling models.dalle.sampling: draw_code=sample_code
models.dalle_streams models.dalle.spans: FromStart=FirstTokens Run=Span
models.decoder models.unclip.decoder: known_part=masked_image
models.dvae models.codecs.dvae: pixels_of=logits_to_pixels
models.int8 models.cpu.int8: Int8Weight=Int8Layer
models.layers models.cpu.kernels: Linear=FewRowsLinear
models.packing models.cpu.packing: Packed=PackedLayer
models.text_prior models.unclip.prior: OnDraw=OnPrediction
models.text_prior models.layers: TextPrefix=KeyValues
models.unet models.unet: double=upsample_nearest
pictures image_io: lacks_picture=lacks_image open_picture=open_image
pipelines.arguments cli.arguments: Argument=SamplingFlag add_arguments=add_sampling
pipelines.base pipelines.request: Picture=ImageInput check_count check_images check_prompts
pipelines.base pipelines.request: generators_from progress_bar random_generators seeds_from
pipelines.base pipelines.request: split_batches
pipelines.base pipelines.runtime: default_dtype find_device
pipelines.base pipelines.provenance: redraw=regenerate decode_array encode_array
pipelines.base image_io: to_pil
pipelines.base pipelines.base: TextToImage=Pipeline inference=in_inference_mode
pipelines.dalle_stages pipelines.dalle.pipeline: DalleStages=DallePipeline
pipelines.latent pipelines.unclip.latent: places_on_path=path_positions
pipelines.networks pipelines.unclip.pipeline: UnCLIPNetworks=UnCLIPPipeline
pipelines.placement pipelines.base: Placement=Pipeline
pipelines.recipes pipelines.provenance: decode_picture=decode_image encode_picture=encode_image
pipelines.recipes pipelines.provenance: picture_source=image_source
pipelines.runs pipelines.diffusion_stage: StageRun=BoundStage
pipelines.runs image_io: fit to_tensor
pipelines.runs pipelines.request: several=open_images unopened=list_images
pipelines.stages pipelines.unclip.pipeline: UnCLIPStages=UnCLIPPipeline
pipelines.command_line cli.arguments: add_placement=add_runtime read_prompts=prompts_file
pipelines.command_line cli.arguments: share=fraction
pipelines.command_line cli.output: check_file check_output check_writable=check_result columns_of
pipelines.command_line image_io: slug
pipelines.command_line cli.output: write=write_images write_figures=write_json
pipelines.command_line cli.loading: load_model load_named
pipelines.offload pipelines.offload: Residency=Offloader
pipelines.settling pipelines.inference: settled=prepare_for_inference
pipelines.wording pipelines.request: Wording=PromptBatch
tokenizer tokenizer: warn_cut=warn_truncated
training.codec training.codec: JudgedCodec=AdversarialCodec
training.frozen training.initialization: load_clip
training.inpainting training.inpainting: cut_out=foreground_alpha
training.losses training.losses: DropConfig=ConditionDropout mixed=mix_embeddings
training.losses training.losses: noised=add_embedding_noise resized=resize_square
training.processes training.launch: this_process
training.checkpoints training.random_state: random_state set_random_state
training.checkpoints training.run_state: MUTABLE_SETTINGS RunState
training.launch training.stopping: StopRequest resume_command
training.run_state training.run_state: MAY_CHANGE=MUTABLE_SETTINGS
training.run_state training.initialization: load_weights read_weights
training.stop training.stopping: StopRequest
training.vocabulary training.initialization: make_tokenizer
training.warm_start training.initialization: warm_start
""")

_CHANGED = {*MODULES, *(name.rpartition(".")[0] for name in NAMES)}


def install() -> None:
    """Serve old module paths and names; `unclip/__init__.py` calls this once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def lookup(module: str, name: str) -> Any:
    """Return the object that used to be `module.name`, with a warning.

    Raises AttributeError if there is none.
    """
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
