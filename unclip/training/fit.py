"""The training loop of every network: EMA, exact resume, validation, previews, several devices.

<output>/config.json     all settings of the run
<output>/metrics.jsonl   a row for each report: step, hours, losses
<output>/logs            TensorBoard
<output>/previews        images with fixed seeds
<output>/checkpoints     step-0001000 and so on: see checkpoints.py
<output>/model           the averaged weights of the newest checkpoint, for use
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, set_seed
from PIL import Image
from torch import Tensor, nn

from unclip.config import NonNegativeInt, PositiveInt, ProperFraction, config, save_json, to_dict
from unclip.files import atomic_folder
from unclip.models.cpu.kernels import use_kernels
from unclip.tokenizer import BPETokenizer
from unclip.training.checkpoints import Checkpoints, RunState, random_state, set_random_state
from unclip.training.dry_run import describe
from unclip.training.ema import EMA
from unclip.training.initialization import load_weights
from unclip.training.launch import Run, StopRequest, make_accelerator, resume_command
from unclip.training.log import DEFAULT_TRACKERS, Log, Trackers
from unclip.training.optim import OptimConfig, build_optimizer
from unclip.weights import write_tensors

Batch = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
Preview = Callable[[nn.Module], Image.Image]
Export = Callable[[nn.Module, Path], None]
BeforeStep = Callable[[int], None]


@config
class FitConfig:
    """The loop and the run folder. Every `*_every` is a number of updates; 0 means never."""

    output: str  # the run folder
    steps: PositiveInt  # updates of the weights
    accumulate: PositiveInt = 1  # batches per update
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of autocast; the weights stay fp32
    channels_last: bool = False  # memory format of weights and images
    ema: ProperFraction | None = 0.999  # decay; null: no average
    compile: bool = False  # torch.compile
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower
    seed: int = 0
    log_every: NonNegativeInt = 50
    val_every: NonNegativeInt = 1000
    val_batches: PositiveInt | None = None  # per validation; null: all
    preview_every: NonNegativeInt = 1000
    save_every: NonNegativeInt = 1000
    keep: PositiveInt = 2  # number of checkpoints
    # any that accelerate supports: [tensorboard, wandb], or with options {wandb: {entity: me}}
    trackers: Trackers = DEFAULT_TRACKERS
    progress: bool = True  # a bar if standard output is a terminal


class Loader(Protocol):
    """Batches of an epoch from the current position on; the next `iter` starts the next epoch."""

    @property
    def broken(self) -> Mapping[Any, str]: ...  # images that could not be read, and why
    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...  # batches per epoch
    def state_dict(self) -> dict[str, int]: ...  # the position after the batches returned so far
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

    loss_fn(model, batch)   returns scalars: "loss" is minimised, the others are logged. It runs
                            under autocast and uses torch's global generator, whose state is saved.
                            Frozen networks are in its closure.
    preview(model)          returns an image; called with the averaged weights.
    export(model, folder)   writes the averaged weights at each checkpoint; default:
                            model.safetensors.
    before_step(step)       is called before each update, for losses that change over time.
    tokenizer               is stored in the checkpoints.

    Raises SystemExit(0) after a dry run, and after SIGTERM or Ctrl-C once a checkpoint is saved;
    FloatingPointError before an update with a loss or gradient that is not finite; ValueError for
    settings that do not fit; OSError for a full disk.
    """
    run = run or Run({"fit": to_dict(config), "optim": to_dict(optim)})
    for name, data in (("training", loader), ("validation", val_loader)):
        if data is not None and len(data) < 1:
            raise ValueError(f"the {name} data has no batch; is the batch larger than the data?")
    try:
        trainer = _Trainer(model, loss_fn, loader, config, optim, run, before_step, tokenizer)
        return trainer.train(val_loader, preview, export)
    finally:  # process-wide singletons: the next fit may need another precision
        AcceleratorState._reset_state()
        GradientState._reset_state()


class _Trainer:
    """One run of `fit`: the model and its state on this process's device."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        loader: Loader,
        config: FitConfig,
        optim: OptimConfig,
        run: Run[Any],
        before_step: BeforeStep | None,
        tokenizer: BPETokenizer | None,
    ) -> None:
        self.config, self.optim, self.loader = config, optim, loader
        self.loss_fn, self.before_step = loss_fn, before_step
        self.output = Path(config.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.keep)
        checkpoint = self._checkpoint_to_resume(run)
        accelerator = make_accelerator(config.precision, config.trackers, config.output)
        self.accelerator = accelerator
        if run.init:
            load_weights(model, run.init)
        _configure(model, config, accelerator.device)
        self.unwrapped = model.to(accelerator.device).train()
        if run.dry_run:
            self._dry_run()
        self.model = accelerator.prepare_model(model)  # wrapped for several processes
        optimizer = build_optimizer(model, optim)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ema = EMA(model, config.ema) if config.ema is not None else None
        parts = (model, optimizer, self.ema, loader, accelerator.scaler)
        self.state = RunState(*parts, run.config, accelerator.num_processes, tokenizer)
        self.resumed_random_state = (
            self.state.restore(checkpoint, accelerator.process_index) if checkpoint else None
        )

    def train(
        self, val_loader: Loader | None, preview: Preview | None, export: Export | None
    ) -> Path:
        config, accelerator, state = self.config, self.accelerator, self.state
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            save_json(state.settings, self.output / "config.json")
        progress = (config.steps, state.step, state.hours)
        self.log = Log(
            accelerator, self.output, state.settings, *progress, config.progress, config.trackers
        )
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
                    if val_loader is not None and self._due(config.val_every):
                        self._validate(val_loader)
                    if preview is not None and self._due(config.preview_every):
                        self._preview(preview)
                    stopping = self._any(stop.requested)
                    if stopping or self._due(config.save_every) or state.step == config.steps:
                        self._save(export)
                    if stopping and state.step < config.steps:
                        command = resume_command()
                        self.log.print(f"stopped after step {state.step}; to resume: {command}")
                        raise SystemExit(0)
            if not (self.output / "model").is_dir():  # resumed from the last checkpoint
                self._save(export)
        finally:
            self.log.close()
            # Without this the model would stay under autocast.
            self.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            accelerator.free_memory()  # releases the process group, which must end first
            accelerator.end_training()
        return self.output / "model"

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.steps)

    def _any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: all must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        value = torch.tensor(float(flag), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(value)
        return bool(total > 0)

    # -- one step

    def _update(self, batches: Iterator[Batch]) -> None:
        """Update the weights once, from `accumulate` batches."""
        accelerator, config = self.accelerator, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr_at(self.state.step, config.steps)
        if self.before_step is not None:
            self.before_step(self.state.step)
        used, losses = [], []
        for i in range(config.accumulate):
            batch = next(batches)
            is_last = i == config.accumulate - 1  # gradients are averaged over processes only then
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    terms = self.loss_fn(self.model, batch)
                accelerator.backward(terms["loss"] / config.accumulate)
            used.append(batch)
            losses.append(terms["loss"].detach().float())
            self.log.count(terms, samples=len(next(iter(batch.values()))))
        norm = accelerator.clip_grad_norm_(self.params, self.optim.clip_norm or math.inf)
        assert norm is not None  # only DeepSpeed returns None
        self._check_finite(torch.stack(losses), norm, used)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema and not self._overflowed(norm):
            self.ema.update()
        self.state.step += 1
        self.log.advance(norm)

    def _overflowed(self, norm: Tensor) -> bool:
        """Return whether fp16's loss scale was too large and the optimizer skipped the update."""
        return self.accelerator.scaler is not None and not torch.isfinite(norm)

    def _check_finite(self, losses: Tensor, norm: Tensor, batches: list[Batch]) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:
            norm = torch.zeros_like(norm)  # an overflow adjusts the loss scale; it is not an error
        if torch.isfinite(losses.sum() + norm):  # the only synchronisation with the device per step
            return
        bad = [b for b, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        keys = [str(key) for batch in bad or batches for key in batch.get("key", ())]
        grads = [
            name
            for name, p in self.unwrapped.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        raise FloatingPointError(
            f"step {self.state.step + 1}: loss {losses.mean().item():g}, "
            f"gradient norm {norm.item():g}"
            + (f" (in {grads[0]} and {len(grads) - 1} more)" if grads else "")
            + f"; batch: {', '.join(keys) or 'no keys'}. "
            "The weights were not updated, nothing was saved"
        )

    def _batches(self) -> Iterator[Batch]:
        while True:
            batches = iter(self.loader)
            while True:
                # Loading uses a copy of the random state (a DataLoader draws a seed at the start of
                # an epoch): a run resumed within an epoch must equal an uninterrupted one.
                with torch.random.fork_rng(devices=[]):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield self._to_device(batch)

    def _to_device(self, batch: Batch) -> Batch:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to(self.accelerator.device, non_blocking=True)
            if self.config.channels_last and value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            return value

        return {name: move(value) for name, value in batch.items()}

    def _dry_run(self) -> None:
        config, batch = self.config, next(self._batches())
        with self.accelerator.autocast():  # in every process: a loss may gather from the others
            text = describe(
                self.unwrapped,
                lambda: self.loss_fn(self.unwrapped, batch)["loss"],
                batch,
                accumulate=config.accumulate,
                ema=config.ema is not None,
                optimizer=self.optim.kind,
                frozen=[x for x in vars(self.loss_fn).values() if isinstance(x, nn.Module)],
            )
        self.accelerator.print(text)
        raise SystemExit(0)

    # -- reports

    def _report(self) -> None:
        position = self.loader.state_dict()
        values = {
            "lr": self.optim.lr_at(self.state.step - 1, self.config.steps),
            "epoch": position["epoch"] + position["batch"] / len(self.loader),
        }
        if self.loader.broken:
            values["broken"] = len(self.loader.broken)
        self.log.training(self.state.step, values)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Use averaged weights, eval mode and fixed noise, and leave the training unchanged."""
        before = random_state()
        self.unwrapped.eval()
        try:
            with torch.no_grad(), self._averaged(), self.accelerator.autocast():
                set_seed(self.config.seed + self.accelerator.process_index)
                yield
        finally:
            self.unwrapped.train()
            set_random_state(before)
            self.log.restart_clock()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.swapped_in() if self.ema else contextlib.nullcontext()

    def _validate(self, loader: Loader) -> None:
        loader.load_state_dict({"epoch": 0, "batch": 0})
        sums: dict[str, Tensor] = {}
        count = 0
        with self._evaluating():
            for count, batch in enumerate(loader, start=1):
                for name, value in self.loss_fn(self.unwrapped, self._to_device(batch)).items():
                    sums[name] = sums.get(name, 0) + value.float()
                if count == self.config.val_batches:
                    break
        self.log.validation(self.state.step, {name: x / count for name, x in sums.items()})

    def _preview(self, preview: Preview) -> None:
        if self.accelerator.is_main_process:
            with self._evaluating():
                self.log.image(self.state.step, preview(self.unwrapped))
        self.accelerator.wait_for_everyone()

    # -- checkpoints

    def _checkpoint_to_resume(self, run: Run[Any]) -> Path | None:
        source = self.checkpoints.find(run.resume) if run.resume else None
        existing = self.checkpoints.all()
        resumed = source is not None and existing and source.resolve() == existing[-1].resolve()
        if existing and not (run.dry_run or resumed):
            fault = f"{self.output} already contains {existing[-1].name}, which would be lost"
            raise ValueError(f"{fault}; --resume latest, or choose another fit.output")
        return source

    def _save(self, export: Export | None) -> None:
        random_states = gather_object([random_state()])  # one per process
        self.state.hours = self.log.hours()
        if self.accelerator.is_main_process:
            with self.checkpoints.writing(self.state.step) as folder:
                self.state.save(folder, random_states)
            with atomic_folder(self.output / "model") as folder, torch.no_grad(), self._averaged():
                if export is not None:
                    export(self.unwrapped, folder)
                else:
                    write_tensors(self.unwrapped, folder / "model.safetensors")
        self.accelerator.wait_for_everyone()
        self.log.restart_clock()


def _configure(model: nn.Module, config: FitConfig, device: torch.device) -> None:
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    if config.compile:
        model.compile()
    else:
        use_kernels(model, device)


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    flags = ("gradient_checkpointing", "grad_checkpointing")  # ours, open_clip's
    found = [(m, flag) for m in model.modules() for flag in flags if hasattr(m, flag)]
    for module, flag in found:
        setattr(module, flag, True)
    if not found:
        raise ValueError(f"{type(model).__name__} does not support fit.gradient_checkpointing")
