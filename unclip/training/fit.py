"""The training loop of every network: accelerate, EMA, checkpoints that resume bit for bit, validation, previews.

<output>/config.json     all settings of the run
<output>/metrics.jsonl   a row for each report: step, hours, losses
<output>/logs            TensorBoard
<output>/previews        pictures with fixed seeds
<output>/checkpoints     step-0001000 and so on: see run_state.py
<output>/model           the averaged weights of the newest checkpoint, for use
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from unclip.config import save_json, to_dict
from unclip.files import atomic_folder
from unclip.training.checkpoints import Checkpoints
from unclip.training.dry_run import describe
from unclip.training.ema import EMA
from unclip.training.launch import Run, resume_command
from unclip.training.log import DEFAULT_TRACKERS, Log
from unclip.training.optim import OptimConfig, build_optimizer
from unclip.training.processes import accelerator_for
from unclip.training.random_state import random_state, set_random_state
from unclip.training.run_state import RunState, load_weights
from unclip.training.stop import StopRequest
from unclip.weights import write_tensors

if TYPE_CHECKING:
    from PIL import Image

    from unclip.tokenizer import BPETokenizer

Batch = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
Preview = Callable[[nn.Module], "Image.Image"]
Export = Callable[[nn.Module, Path], None]
BeforeStep = Callable[[int], None]


@dataclass(frozen=True)
class FitConfig:
    """How a network is trained, and what its run folder gets. Every `*_every` counts updates; 0 = never."""

    output: str  # the run folder
    steps: int  # updates of the weights
    accumulate: int = 1  # batches for each update
    precision: Literal["fp32", "bf16", "fp16"] = (
        "bf16"  # of the arithmetic (autocast); the weights stay fp32
    )
    channels_last: bool = False
    ema: float | None = 0.999  # decay; null = no average
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 50
    val_every: int = 1000
    val_batches: int | None = None  # of a validation; null = all
    preview_every: int = 1000
    save_every: int = 1000
    keep: int = 2  # checkpoints
    trackers: tuple[str, ...] = DEFAULT_TRACKERS  # any that accelerate knows
    progress: bool = True  # a bar, if standard output is a terminal

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("log_every", "val_every", "preview_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a number of steps, or 0 for never"
                )
        if self.val_batches is not None and self.val_batches < 1:
            raise ValueError(
                f"val_batches is {self.val_batches}; expected at least 1, or null for all"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(
                f"ema is {self.ema}; expected a decay in [0, 1), such as 0.999, or null"
            )


class Loader(Protocol):
    """Batches of one pass over the data, from the current place on; the next `iter` begins the next pass."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...  # batches in a pass
    def state_dict(self) -> dict[str, int]: ...  # the place, counting the batches handed out
    def load_state_dict(self, state: dict[str, int]) -> None: ...


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Loader,
    config: FitConfig,
    optim: OptimConfig,
    *,
    run: Run[Any] | None = None,
    val_loader: Loader | None = None,
    preview: Preview | None = None,
    export: Export | None = None,
    before_step: BeforeStep | None = None,
    tokenizer: BPETokenizer | None = None,
) -> Path:
    """Train `model` and return the folder of its averaged weights, `<output>/model`.

    `loss_fn(model, batch)` gives scalars; "loss" is minimised, the others are logged. It runs under autocast and draws
    its noise from torch's global generator, whose state is saved and restored. Frozen networks live in its closure.
    `preview(model)` draws a picture and `export(model, folder)` writes a component, both with the averaged weights;
    without `export` the folder gets model.safetensors. `<output>/model` is renewed at every checkpoint.
    `before_step(step)` is told before each update how many there were: for a loss that changes as training goes on.
    `tokenizer` is kept in the checkpoints: see vocabulary.py.

    A dry run, and a SIGTERM or Ctrl-C after saving, end in SystemExit(0). Raises FloatingPointError when the loss or
    the gradient is not finite, before the update; ValueError for settings that do not fit; OSError for a full disk.
    """
    run = run or Run({"fit": to_dict(config), "optim": to_dict(optim)})
    for name, data in (("training", loader), ("validation", val_loader)):
        if data is not None and len(data) < 1:
            raise ValueError(f"the {name} data has no batch; is the batch larger than the data?")
    try:
        given = (
            model,
            loss_fn,
            loader,
            config,
            optim,
            run,
            val_loader,
            preview,
            export,
            before_step,
            tokenizer,
        )
        return _Fit(*given).train()
    finally:  # accelerate keeps its settings in process-wide singletons; the next fit may want another precision
        AcceleratorState._reset_state()
        GradientState._reset_state()


@dataclass
class _Fit:
    raw: nn.Module  # `model` may be wrapped for several processes
    loss_fn: LossFn
    loader: Loader
    config: FitConfig
    optim: OptimConfig
    run: InitVar[Run[Any]]
    val_loader: Loader | None
    preview: Preview | None
    export: Export | None
    before_step: BeforeStep | None
    tokenizer: BPETokenizer | None

    def __post_init__(self, run: Run[Any]) -> None:
        config, model = self.config, self.raw
        self.output = Path(config.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.keep)
        source = self._source(run)
        self.accelerator = accelerator = accelerator_for(config)
        if run.init:
            load_weights(model, run.init)
        _configure(model, config)
        model.to(accelerator.device).train()
        if run.dry_run:
            self._dry_run()
        self.model = accelerator.prepare_model(model)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(model, self.optim))
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ema = EMA(model, config.ema) if config.ema is not None else None
        self.state = RunState(
            model,
            self.optimizer.optimizer,
            self.ema,
            self.loader,
            accelerator.scaler,
            run.config,
            accelerator.num_processes,
            self.tokenizer,
        )
        self.resumed_random_state = (
            self.state.restore(source, accelerator.process_index) if source else None
        )

    def train(self) -> Path:
        config, accelerator, state = self.config, self.accelerator, self.state
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            save_json(state.settings, self.output / "config.json")
        self.log = Log(accelerator, self.output, state, config.steps, config.progress)
        batches = self._batches()
        if self.resumed_random_state is None:
            set_seed(config.seed + accelerator.process_index)
        else:
            set_random_state(self.resumed_random_state)
        try:
            with StopRequest() as stop:
                while state.step < config.steps:
                    self._update(batches)
                    if self._due(config.log_every):
                        self._report()
                    if self.val_loader is not None and self._due(config.val_every):
                        self._validate(self.val_loader)
                    if self.preview is not None and self._due(config.preview_every):
                        self._draw(self.preview)
                    stopping = self._any(stop.requested)
                    if stopping or self._due(config.save_every) or state.step == config.steps:
                        self._save()
                    if stopping and state.step < config.steps:
                        self.log.say(
                            f"stopped after step {state.step}; to go on: {resume_command()}"
                        )
                        raise SystemExit(0)
            if not (self.output / "model").is_dir():  # resumed from a last checkpoint
                self._save()
        finally:
            self.log.close()
            self.model = accelerator.unwrap_model(
                self.model, keep_fp32_wrapper=False
            )  # else it stays under autocast
            accelerator.free_memory()  # the process group must end before the process does, so nothing may hold it
            accelerator.end_training()
        return self.output / "model"

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.steps)

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0
        )

    # -- one step

    def _update(self, batches: Iterator[Batch]) -> None:
        """One update of the weights, from `accumulate` batches."""
        accelerator, config = self.accelerator, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr_at(self.state.step, config.steps)
        if self.before_step is not None:
            self.before_step(self.state.step)
        used, losses = [], []
        for i in range(config.accumulate):
            batch = next(batches)
            is_last = (
                i == config.accumulate - 1
            )  # only then are the gradients averaged over processes
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    terms = self.loss_fn(self.model, batch)
                accelerator.backward(terms["loss"] / config.accumulate)
            used.append(batch)
            losses.append(terms["loss"].detach().float())
            self.log.count(terms, samples=len(next(iter(batch.values()))))
        norm = accelerator.clip_grad_norm_(self.params, self.optim.clip_norm or math.inf)
        self._check_finite(torch.stack(losses), norm, used)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema and not self._overflowed(norm):
            self.ema.update()
        self.state.step += 1
        self.log.advance(norm)

    def _overflowed(self, norm: Tensor) -> bool:
        """Whether fp16's loss scale was too large, and the update was skipped; fused optimisers don't tell."""
        return self.accelerator.scaler is not None and not torch.isfinite(norm)

    def _check_finite(self, losses: Tensor, norm: Tensor, batches: list[Batch]) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:
            norm = torch.zeros_like(
                norm
            )  # fp16 finds its loss scale by overflowing; the scaler skips that update
        if torch.isfinite(losses.sum() + norm):  # the only time that a step waits for the device
            return
        bad = [
            batch for batch, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)
        ]
        keys = [str(key) for batch in bad or batches for key in batch.get("key", ())]
        grads = [
            n
            for n, p in self.raw.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        raise FloatingPointError(
            f"step {self.state.step + 1}: loss {losses.mean().item():g}, gradient norm {norm.item():g}"
            + (f" (in {grads[0]} and {len(grads) - 1} more)" if grads else "")
            + f"; batch: {', '.join(keys) or 'without keys'}. The weights were not updated, nothing was saved"
        )

    def _batches(self) -> Iterator[Batch]:
        while True:
            batches = iter(self.loader)
            while True:
                # Loading draws from a copy of the random state (a DataLoader draws a seed when a pass begins):
                # else a run resumed in mid-pass would differ from one that went through.
                with torch.random.fork_rng(devices=[]):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the device, pictures in the memory format of the weights."""

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to(self.accelerator.device, non_blocking=True)
            if self.config.channels_last and value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            return value

        return {name: place(value) for name, value in batch.items()}

    # -- looking at it

    def _report(self) -> None:
        values = {
            "lr": self.optim.lr_at(self.state.step - 1, self.config.steps),
            "epoch": self._epoch(),
        }
        if broken := getattr(self.loader, "broken", None):  # pictures that could not be read
            values["broken"] = len(broken)
        self.log.training(self.state.step, values)

    def _epoch(self) -> float:
        place = self.loader.state_dict()
        return place["epoch"] + place["batch"] / len(self.loader)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """The averaged weights in eval mode, with the same noise every time and no trace in the training's."""
        before = random_state()
        self.raw.eval()
        try:
            with torch.no_grad(), self._averaged():
                set_seed(self.config.seed + self.accelerator.process_index)
                yield
        finally:
            self.raw.train()
            set_random_state(before)
            self.log.restart_clock()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.swapped_in() if self.ema else contextlib.nullcontext()

    def _validate(self, loader: Loader) -> None:
        loader.load_state_dict({"epoch": 0, "batch": 0})
        sums: dict[str, Tensor] = {}
        with self._looking(), self.accelerator.autocast():
            for n, batch in enumerate(loader, start=1):
                for name, value in self.loss_fn(self.raw, self._placed(batch)).items():
                    sums[name] = sums.get(name, 0) + value.float()
                if n == self.config.val_batches:
                    break
        self.log.validation(self.state.step, {name: value / n for name, value in sums.items()})

    def _draw(self, preview: Preview) -> None:
        if self.accelerator.is_main_process:
            with self._looking(), self.accelerator.autocast():
                self.log.picture(self.state.step, preview(self.raw))
        self.accelerator.wait_for_everyone()

    def _dry_run(self) -> None:
        batch = next(self._batches())
        with (
            self.accelerator.autocast()
        ):  # in every process: a loss may gather what the others have
            told = describe(
                self.raw, lambda: self.loss_fn(self.raw, batch)["loss"], batch, self.config
            )
        self.accelerator.print(told)
        raise SystemExit(0)

    # -- keeping it

    def _source(self, run: Run[Any]) -> Path | None:
        """The checkpoint to go on from."""
        source = self.checkpoints.find(run.resume) if run.resume else None
        kept = self.checkpoints.all()
        if kept and not run.dry_run and (source is None or source.resolve() != kept[-1].resolve()):
            raise ValueError(
                f"{self.output} already holds {kept[-1].name}, which would be lost; "
                "--resume latest, or choose another fit.output"
            )
        return source

    def _save(self) -> None:
        random_states = gather_object([random_state()])  # one for each process
        self.state.hours = self.log.hours()
        if self.accelerator.is_main_process:
            with self.checkpoints.writing(self.state.step) as folder:
                self.state.save(folder, random_states)
            with atomic_folder(self.output / "model") as folder, torch.no_grad(), self._averaged():
                if self.export is not None:
                    self.export(self.raw, folder)
                else:
                    write_tensors(self.raw, folder / "model.safetensors")
        self.accelerator.wait_for_everyone()
        self.log.restart_clock()


def _configure(model: nn.Module, config: FitConfig) -> None:
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        flags = ("gradient_checkpointing", "grad_checkpointing")  # ours, open_clip's
        able = [
            (module, flag) for module in model.modules() for flag in flags if hasattr(module, flag)
        ]
        for module, flag in able:
            setattr(module, flag, True)
        if not able:
            raise ValueError(
                f"{type(model).__name__} has no gradient checkpointing; take it from the config"
            )
    if config.compile:
        model.compile()
