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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object, set_seed
from annotated_types import Interval
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unclip.config import (
    NonNegativeInt,
    Positive,
    PositiveInt,
    ProperFraction,
    config,
    save_json,
    to_dict,
)
from unclip.data.loader import Batch
from unclip.models.cpu.kernels import use_kernels
from unclip.models.layers import enable_gradient_checkpointing
from unclip.tokenizer import BPETokenizer
from unclip.training import sharding
from unclip.training.checkpoints import Checkpoints, fault
from unclip.training.dry_run import describe
from unclip.training.ema import EMA
from unclip.training.initialization import load_weights
from unclip.training.launch import Run, default_precision, make_accelerator
from unclip.training.lock import locked
from unclip.training.log import DEFAULT_TRACKERS, Log, Trackers
from unclip.training.multiprocess import any_process, on_main, rank
from unclip.training.optim import OptimConfig, build_optimizer
from unclip.training.random_state import random_state, set_random_state
from unclip.training.run_state import Loader, RunState, restore_random_state
from unclip.training.saving import Export, Saver
from unclip.training.stopping import Interrupted, StopRequest, resume_command
from unclip.weights import write_tensors

LossFn = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
Preview = Callable[[Any], Image.Image]  # of the network that is trained
Measure = Callable[[Sequence[Batch]], Mapping[str, float]]
BeforeStep = Callable[[int], None]

VALIDATION, PREVIEW = "validation", "preview"
MEASURED = 256  # samples of a validation that are given to `measure`, of all processes


@config
class FitConfig:
    """The loop and the run folder. Every `*_every` is a number of updates; 0 means never."""

    output: str  # the run folder
    steps: PositiveInt  # updates of the weights
    accumulate: PositiveInt = 1  # batches per update
    # of autocast; the weights stay fp32
    precision: Literal["fp32", "bf16", "fp16"] = field(default_factory=default_precision)
    channels_last: bool = False  # memory format of weights and images
    ema: ProperFraction | None = 0.999  # decay; null: no average
    compile: bool = False  # torch.compile
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower
    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    log_every: NonNegativeInt = 50
    val_every: NonNegativeInt = 1000
    val_batches: PositiveInt | None = None  # per validation; null: all
    preview_every: NonNegativeInt = 1000
    save_every: NonNegativeInt = 1000
    keep: PositiveInt = 2  # number of checkpoints
    async_save: bool = False  # train while a checkpoint is written; needs memory for a copy of it
    max_hours: Positive | None = None  # save and exit after this time, to be resumed
    # any that accelerate supports: [tensorboard, wandb], or with options {wandb: {entity: me}}
    trackers: Trackers = DEFAULT_TRACKERS
    progress: bool = True  # a bar if standard output is a terminal


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
    statistics: nn.Module | None = None,
    measure: Measure | None = None,
) -> Path:
    """Train `model` and return the folder of its averaged weights, `<output>/model`.

    loss_fn(model, batch)   returns scalars: "loss" is minimised, the others are logged. It runs
                            under autocast and uses torch's global generator, whose state is saved.
                            Frozen networks are in its closure.
    preview(model)          returns an image; called with the averaged weights.
    export(model, folder)   writes the averaged weights at each checkpoint; default:
                            model.safetensors. The model is an unsharded copy on the CPU.
    before_step(step)       is called before each update, for losses that change over time; and by
                            a resumed run before the evaluations that the last one had skipped.
    tokenizer               is stored in the checkpoints.
    statistics              has buffers that the loss reads, such as means of the data. Those of the
                            first process are used, stored in the checkpoints and restored.
    measure(batches)        returns what a validation reports besides the losses; called with the
                            averaged weights and the first validation samples, in all processes.

    Raises SystemExit(0) after a dry run, and after SIGTERM, Ctrl-C or `max_hours` once a checkpoint
    is saved; FloatingPointError before an update with a loss or gradient that is not finite;
    ValueError for invalid settings and for a run folder in use; OSError for a full disk.
    """
    run = run or Run({"fit": to_dict(config), "optim": to_dict(optim)})
    for name, data in (("training", loader), ("validation", val_loader)):
        if data is not None and len(data) < 1:
            raise ValueError(f"the {name} data has no batch; is the batch larger than the data?")
    lock = contextlib.nullcontext() if run.dry_run or rank() else locked(Path(config.output))
    try:
        with lock:
            trainer = _Trainer(
                model,
                loss_fn,
                loader,
                config,
                optim,
                run,
                val_loader=val_loader,
                preview=preview,
                export=export or _export_weights,
                before_step=before_step,
                tokenizer=tokenizer,
                statistics=statistics,
                measure=measure,
            )
            return trainer.train()
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
        *,
        val_loader: Loader | None,
        preview: Preview | None,
        export: Export,
        before_step: BeforeStep | None,
        tokenizer: BPETokenizer | None,
        statistics: nn.Module | None,
        measure: Measure | None,
    ) -> None:
        self.config, self.optim, self.loader, self.val_loader = config, optim, loader, val_loader
        self.loss_fn, self.before_step = loss_fn, before_step
        self.preview, self.export, self.measure = preview, export, measure
        self.output = Path(config.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.keep)
        accelerator = make_accelerator(config.precision, config.trackers, config.output)
        self.accelerator = accelerator
        checkpoint = on_main(accelerator, lambda: self._checkpoint_to_resume(run))
        if run.init:
            load_weights(model, run.init)
        self.skeleton = sharding.skeleton(model)
        several = accelerator.num_processes > 1
        self.sharded = several and sharding.requested() and not run.dry_run
        _configure(model, config, accelerator.device, self.sharded)
        self.unwrapped = model.to(accelerator.device).train()
        if run.dry_run:
            self._dry_run()
        if self.sharded:
            mesh = sharding.make_mesh(accelerator.device.type, accelerator.num_processes)
            sharding.shard(model, mesh, config.precision)
            self.model, optimizer = model, build_optimizer(model, optim)
            self.optimizer: torch.optim.Optimizer = optimizer
        else:
            self.model = accelerator.prepare_model(model)  # wrapped for several processes
            optimizer = build_optimizer(model, optim)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        for buffer in statistics.buffers() if several and statistics is not None else ():
            dist.broadcast(buffer, 0)  # each process has measured other data
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ema = EMA(model, config.ema) if config.ema is not None else None
        self.state = RunState(
            model,
            optimizer,
            self.ema,
            loader,
            accelerator.scaler,
            run.config,
            accelerator.num_processes,
            accelerator.process_index,
            tokenizer,
            loader.samples_hash(),
            statistics,
        )
        self.saved, self.saved_random_state = None, None
        if checkpoint:
            self.saved = self.state.restore(checkpoint)
            self.saved_random_state = restore_random_state(checkpoint, accelerator.process_index)

    def train(self) -> Path:
        config, accelerator, state = self.config, self.accelerator, self.state
        if accelerator.is_main_process and state.step <= config.steps:
            save_json(state.settings, self.output / "config.json")
        progress = (config.steps, state.step, state.hours)
        self.log = Log(
            accelerator,
            self.output,
            state.settings,
            *progress,
            config.progress,
            config.trackers,
            validation_pending=VALIDATION in state.pending,
        )
        self.saver = Saver(
            accelerator,
            self.checkpoints,
            self.output,
            self.skeleton,
            self.export,
            config.async_save,
        )
        self._restore_process()
        try:
            with StopRequest(config.max_hours) as self.stop:
                self._loop()
            if state.step < config.steps or state.pending:
                self.log.print(f"stopped after step {state.step}; to resume: {resume_command()}")
                raise SystemExit(0)
        finally:
            self.saver.close()
            self.log.close()
            # Without this the model would stay under autocast.
            self.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            accelerator.free_memory()  # releases the process group, which must end first
            accelerator.end_training()
        return self.output / "model"

    def _restore_process(self) -> None:
        """Set the random state of this process and the sums of its next report."""
        rank = self.accelerator.process_index
        if self.saved_random_state is not None:
            set_random_state(self.saved_random_state)
        else:
            # A new run, or a resumed one with more processes
            set_seed(self.config.seed + rank + self.state.step)
        if self.saved and self.saved.processes == self.accelerator.num_processes:
            for sums in self.saved.reports[rank : rank + 1]:
                self.log.restore(sums)

    def _loop(self) -> None:
        """Train up to the last step or a request to stop, which is followed by a checkpoint."""
        config, state, batches = self.config, self.state, self._batches()
        if state.pending:  # the last run stopped before these evaluations
            if self.before_step is not None:
                self.before_step(state.step - 1)  # as for the update before them
            if self._evaluate():
                return
            if state.step >= config.steps:  # no later checkpoint says that they are done
                self._save()
        elif state.step >= config.steps:
            self.log.print(
                f"nothing to train: the checkpoint is at step {state.step} and fit.steps is "
                f"{config.steps}; set fit.steps higher"
            )
        stopping = False
        while state.step < config.steps and not stopping:
            stopping = self._update(batches)
            if self._due(config.log_every):
                self._report()
            if self.val_loader is not None and self._due(config.val_every):
                state.pending.append(VALIDATION)
            if self.preview is not None and self._due(config.preview_every):
                state.pending.append(PREVIEW)
            stopping = stopping or self._evaluate()
            if stopping or self._due(config.save_every) or state.step == config.steps:
                self._save()
        self.saver.finish()
        if not (self.output / "model").is_dir():  # resumed from the last checkpoint
            self._save()
            self.saver.finish()

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.steps)

    # -- one step

    def _update(self, batches: Iterator[Batch]) -> bool:
        """Update the weights once, from `accumulate` batches; return whether to stop."""
        accelerator, config = self.accelerator, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr_at(self.state.step, config.steps)
        if self.before_step is not None:
            self.before_step(self.state.step)
        used, losses = [], []
        for i in range(config.accumulate):
            batch = next(batches)
            with self._averaging(i == config.accumulate - 1):
                with accelerator.autocast():
                    terms = self.loss_fn(self.model, batch)
                accelerator.backward(terms["loss"] / config.accumulate)
            used.append(batch)
            losses.append(terms["loss"].detach().float())
            self.log.count(terms, samples=_size(batch))
        norm = accelerator.clip_grad_norm_(self.params, self.optim.clip_norm or math.inf)
        assert norm is not None  # only DeepSpeed returns None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # The only synchronisation with the device, and between the processes, per step.
        bad, stopping, saving = any_process(
            accelerator,
            ~torch.isfinite(torch.stack(losses).sum() + self._checked_norm(norm)),
            self.stop.requested,
            self.saver.is_busy,
        )
        if bad:
            raise FloatingPointError(self._describe_fault(losses, norm, used))
        if not saving:
            self.saver.finish()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        overflowed = self._overflowed(norm)
        if self.ema and not overflowed:
            self.ema.update()
        self.state.step += 1
        self.log.advance(None if overflowed else norm)
        return stopping

    def _averaging(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over the processes in `with`: after the last batch of an update."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(wanted)
        elif not wanted:
            return self.accelerator.no_sync(self.model)
        return contextlib.nullcontext()

    def _overflowed(self, norm: Tensor) -> bool:
        """Return whether fp16's loss scale was too large and the optimizer skipped the update."""
        return self.accelerator.scaler is not None and not torch.isfinite(norm)

    def _checked_norm(self, norm: Tensor) -> Tensor:
        """Return the norm, or 0 in fp16, where an overflow only adjusts the loss scale."""
        scaler = self.accelerator.scaler
        return torch.zeros_like(norm) if scaler and scaler.get_scale() >= 1 else norm

    def _describe_fault(self, losses: list[Tensor], norm: Tensor, batches: list[Batch]) -> str:
        """Say which process had a value that is not finite, and in which samples or weights."""
        text, index = self._values_not_finite(losses, norm, batches), self.accelerator.process_index
        reports = gather_object([(index, self._is_at_fault(losses, batches), text)])
        if len(reports) > 1:
            culprits = [report for report in reports if report[1]] or reports
            text = "; ".join(f"process {index}: {text}" for index, _, text in culprits)
        step = self.state.step + 1
        return f"step {step}: {text}. The weights were not updated, and nothing was saved"

    def _values_not_finite(self, losses: list[Tensor], norm: Tensor, batches: list[Batch]) -> str:
        """Describe this process: loss, gradient norm, and the samples or weights at fault."""
        text = f"loss {torch.stack(losses).mean().item():g}, gradient norm {norm.item():g}"
        if found := [name for batch in batches for name in _not_finite(batch)]:
            return f"{text}; not finite: {', '.join(found)}"
        grads = [name for name, p in self.unwrapped.named_parameters() if _is_bad(p.grad)]
        if grads:
            text += f" (in {grads[0]} and {len(grads) - 1} more)"
        bad = [b for b, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        keys = [str(key) for batch in bad or batches for key in batch.get("key", ())]
        return f"{text}; batch: {', '.join(keys) or 'no keys'}"

    def _is_at_fault(self, losses: list[Tensor], batches: list[Batch]) -> bool:
        """Return whether this process has a value that is not finite, not only another one."""
        at_fault = _is_bad(torch.stack(losses)) or any(any(_not_finite(b)) for b in batches)
        if self.accelerator.num_processes > 1 and not any_process(self.accelerator, at_fault)[0]:
            return self._gradient_is_bad(batches)
        return at_fault

    def _gradient_is_bad(self, batches: list[Batch]) -> bool:
        """Return whether the gradient of this process alone, before averaging, is not finite."""
        if self.sharded:
            return False
        params = [p for p in self.unwrapped.parameters() if p.requires_grad]
        with self.accelerator.autocast():
            losses = [self.loss_fn(self.unwrapped, batch)["loss"] for batch in batches]
        return any(map(_is_bad, torch.autograd.grad(losses, params, allow_unused=True)))

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

    def _evaluate(self) -> bool:
        """Run what is pending; return whether to stop, leaving the rest to the resumed run."""
        pending, stopping = self.state.pending, False
        while pending and not stopping:
            if pending[0] == VALIDATION and self.val_loader is not None:
                stopping = not self._validate(self.val_loader)
            elif pending[0] == PREVIEW and self.preview is not None:
                stopping = not self._write_preview(self.preview)
            if not stopping:
                pending.pop(0)
        return stopping

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
            sharding.reshard(self.unwrapped)  # what is gathered are averages
            set_random_state(before)
            self.log.restart_clock()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.ema.swapped_in() if self.ema else contextlib.nullcontext()

    def _validate(self, loader: Loader) -> bool:
        """Report mean losses and measures; return False, without a report, on a request to stop."""
        loader.load_state_dict({"epoch": 0, "batch": 0})
        sums: dict[str, Tensor] = {}
        count, first = 0, []
        measured = math.ceil(MEASURED / self.accelerator.num_processes) if self.measure else 0
        with self._evaluating():
            for count, batch in enumerate(loader, start=1):
                for name, value in self.loss_fn(self.unwrapped, self._to_device(batch)).items():
                    sums[name] = sums.get(name, 0) + value.float()
                if (rest := measured - sum(map(_size, first))) > 0:
                    first.append({name: values[:rest] for name, values in batch.items()})
                if any_process(self.accelerator, self.stop.requested)[0]:
                    return False
                if count == self.config.val_batches:
                    break
            means = {name: x / count for name, x in sums.items()}
            measures = self.measure(first) if self.measure else {}
        self.log.validation(self.state.step, {**means, **measures})
        return True

    def _write_preview(self, preview: Preview) -> bool:
        """Write a preview; return False, without one, on a request to stop."""
        weights = self._averaged_weights() if self.sharded else {}
        with contextlib.suppress(Interrupted):
            if self.accelerator.is_main_process:
                with self._evaluating(), self.stop.interruptible():
                    image = preview(self._filled_skeleton(weights) if weights else self.unwrapped)
                self.log.image(self.state.step, image)
        if weights:
            sharding.fill(self.skeleton, weights, "meta")
        return not any_process(self.accelerator, self.stop.requested)[0]

    def _averaged_weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, whole, on the CPU of the main process."""
        self.saver.finish()  # it uses the skeleton
        with self._averaged():
            return sharding.gather(self.unwrapped, self.accelerator.is_main_process)

    def _filled_skeleton(self, weights: dict[str, Tensor]) -> nn.Module:
        sharding.fill(self.skeleton, weights, self.accelerator.device)
        return self.skeleton.eval()

    # -- checkpoints

    def _checkpoint_to_resume(self, run: Run[Any]) -> Path | None:
        """Return the checkpoint to start from; the damaged ones after it are renamed."""
        source = self.checkpoints.find(run.resume) if run.resume else None
        newer = self.checkpoints.newer(source) if source else self.checkpoints.all()
        if run.dry_run:
            return source
        damaged = {path: reason for path in newer if source and (reason := fault(path))}
        if whole := [path for path in newer if path not in damaged]:
            reason = f"{self.output} already contains {whole[-1].name}, which would be lost"
            raise ValueError(f"{reason}; --resume latest, or choose another fit.output")
        for path, reason in damaged.items():
            renamed = self.checkpoints.set_aside(path)
            print(f"{path} is damaged: {reason}. It is now {renamed.name}", flush=True)
        if damaged:
            print(f"resuming from {source}, the newest whole checkpoint", flush=True)
        return source

    def _save(self) -> None:
        weights = self._averaged_weights()
        random_states = gather_object([random_state()])  # one per process, as the sums
        reports = gather_object([self.log.sums()])
        self.state.hours = self.log.hours()
        snapshot = self.state.snapshot(random_states, reports, copy=self.config.async_save)
        self.saver.save(self.state.step, snapshot, weights)
        self.log.restart_clock()


def _export_weights(model: nn.Module, folder: Path) -> None:
    write_tensors(model, folder / "model.safetensors")


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _is_bad(values: Tensor | None) -> bool:
    return values is not None and not sharding.local(values).isfinite().all()


def _not_finite(batch: Batch) -> Iterator[str]:
    """Yield "image of <key>" for each tensor and sample with a value that is not finite."""
    keys = batch.get("key", ())
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and len(value) == len(keys):
            rows = value.flatten(1).isfinite().all(dim=1).tolist()
            yield from (f"{name} of {key}" for key, ok in zip(keys, rows, strict=True) if not ok)


def _configure(model: nn.Module, config: FitConfig, device: torch.device, sharded: bool) -> None:
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.compile:
        model.compile()
    elif not sharded:
        use_kernels(model, device)
