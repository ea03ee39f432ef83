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

# Old and new module of classes and functions that were renamed, or moved to another module than the
# rest of theirs. Helpers of other modules are left out.
NAMES = _table("""
checkpoints.catalogue checkpoints.summary: ComponentInfo ModelInfo describe summary
checkpoints.contents checkpoints.formats: Contents=Format
checkpoints.formats checkpoints.registry: FORMATS=MODELS load_any
checkpoints.priors checkpoints.formats: PriorFormat=Format
data.codes data.precomputed: CodeDataset
data.loader data.loader: PictureReader=ImageReader
data.precomputed data.precompute: precompute
data.precomputed data.parts: PartWriter
diffusion.guidance diffusion.samplers: guide threshold
diffusion.samplers diffusion.schedulers: make_scheduler scheduler_betas
evaluation.drawing evaluation.dalle: DalleDrawer=DalleGenerator
evaluation.drawing evaluation.generator: Drawer=ImageGenerator Drawn=Samples
evaluation.drawing evaluation.unclip: Imagined=PredictedEmbeddings UnCLIPDrawer=UnCLIPGenerator
evaluation.drift evaluation.approximations: Drift=ApproximationError
evaluation.manipulation evaluation.manipulations: Manipulations=ManipulationEvaluation
models.bart_dalle models.published.bart_dalle: Texts=EncodedTexts
models.dalle models.dalle.transformer: TextPrefix=DALLEPrefix
models.dalle_sampling models.dalle.code_transformer: AnyDALLE=CodeTransformer
models.int8 models.cpu.int8: Int8Weight=Int8Layer
models.layers models.cpu.kernels: Linear=FewRowsLinear
models.packing models.cpu.packing: Packed=PackedLayer
models.text_prior models.layers: TextPrefix=KeyValues
pictures image_io: open_picture=open_image
pipelines.base pipelines.request: Picture=ImageInput
pipelines.base pipelines.provenance: redraw=regenerate decode_array encode_array
pipelines.base pipelines.base: TextToImage=Pipeline
pipelines.dalle_stages pipelines.dalle.pipeline: DalleStages=DallePipeline
pipelines.networks pipelines.unclip.pipeline: UnCLIPNetworks=UnCLIPPipeline
pipelines.offload pipelines.offload: Residency=Offloader
pipelines.placement pipelines.base: Placement=Pipeline
pipelines.runs pipelines.diffusion_stage: StageRun=BoundStage
pipelines.stages pipelines.unclip.pipeline: UnCLIPStages=UnCLIPPipeline
pipelines.wording pipelines.request: Wording=PromptBatch
training.codec training.codec: JudgedCodec=AdversarialCodec
training.frozen training.initialization: load_clip
training.losses training.losses: DropConfig=ConditionDropout
training.checkpoints training.run_state: RunState
training.launch training.stopping: StopRequest
training.run_state training.initialization: load_weights
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
