"""Saving of checkpoints and averaged weights, optionally while training continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

from unclip.files import atomic_folder
from unclip.training.checkpoints import Checkpoints, write_manifest
from unclip.training.lock import lock_id
from unclip.training.multiprocess import on_main
from unclip.training.run_state import Snapshot
from unclip.training.sharding import fill

Export = Callable[[nn.Module, Path], None]


class Saver:
    """Writes checkpoints, and the averaged weights to `<output>/model`.

    Each process writes its tensors to a temporary folder. When all have finished, the main process
    adds the manifest and renames the folder: a checkpoint exists as a whole or not at all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        output: Path,
        skeleton: nn.Module,
        export: Export,
        in_background: bool,
    ) -> None:
        self.accelerator, self.checkpoints, self.output = accelerator, checkpoints, output
        self.skeleton, self.export = skeleton, export
        self._pool = ThreadPoolExecutor(1, "save") if in_background else None
        self._writing: Future[dict[str, Any]] | None = None
        self._step = 0
        self._lock = lock_id(output)
        self._parts = checkpoints.folder / ".writing", output / ".writing-model"

    @property
    def is_busy(self) -> bool:
        """Whether this process still writes, and `finish` would wait."""
        return self._writing is not None and not self._writing.done()

    def save(self, step: int, snapshot: Snapshot, weights: dict[str, Tensor]) -> None:
        """Write a checkpoint and the averaged `weights`; in the background, up to `finish`."""
        self.finish()
        self._step, is_main = step, self.accelerator.is_main_process
        on_main(self.accelerator, self._make_folders)

        def write() -> dict[str, Any]:
            checkpoint, model = self._parts
            entries = snapshot.write_tensors(checkpoint)
            if is_main:
                snapshot.write_documents(checkpoint)
                fill(self.skeleton, weights, "cpu")
                self.export(self.skeleton, model)
                fill(self.skeleton, weights, "meta")
            return entries

        if self._pool is not None:
            self._writing = self._pool.submit(write)
            return
        self._writing = Future()
        try:
            self._writing.set_result(write())
        except (OSError, SafetensorError) as error:
            self._writing.set_exception(error)
        self.finish()

    def finish(self) -> None:
        """Wait for the files of all processes and publish them; OSError if one was not written."""
        if self._writing is None:
            return
        error = self._writing.exception()
        if error is not None and not isinstance(error, (OSError, SafetensorError)):
            raise error
        entries = {} if error else self._writing.result()
        self._writing = None
        written = gather_object([(error and str(error), entries)])
        on_main(self.accelerator, lambda: self._publish(written))

    def close(self) -> None:
        """End the thread; what was not published is dropped."""
        if self._pool is not None:
            self._pool.shutdown()
        if self.accelerator.is_main_process and lock_id(self.output) == self._lock:
            for part in self._parts:
                shutil.rmtree(part, ignore_errors=True)

    def _make_folders(self) -> None:
        if lock_id(self.output) != self._lock:  # another run may be writing there
            reason = "the folder was removed or replaced during the training"
            raise OSError(f"cannot save to {self.output}: {reason}; start the run again")
        for part in self._parts:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def _publish(self, written: list[tuple[str | None, dict[str, Any]]]) -> None:
        checkpoint, model = self._parts
        with self.checkpoints.writing(self._step) as folder:
            for error, _ in written:
                if error is not None:
                    raise OSError(error)
            _move(checkpoint, folder)
            write_manifest(folder, {k: v for _, files in written for k, v in files.items()})
            # The model is published before the checkpoint: after a kill in between, the resumed run
            # repeats both. In the other order, it could start at the last step with an old model.
            with atomic_folder(self.output / "model") as exported:
                _move(model, exported)


def _move(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
    source.rmdir()
