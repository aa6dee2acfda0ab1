"""The trainer: epochs of steps, on one device or several."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_cache.errors import ConfigError, DivergedError, RunError
from data_cache.reader import CacheStore
from data_cache.text import pluralise
from liverseg.device import (
    DTYPE_NAMES,
    autocast,
    autocast_dtype,
    compiles,
    cudnn_warning,
    freed_memory_reused,
    matmul_peak,
    training_dtype,
)
from liverseg.model.inputs import add_background, foreground_fractions, network_input
from liverseg.model.logit_normal import negative_log_likelihood
from liverseg.model.losses import LossConfig
from liverseg.model.losses import loss as loss_of
from liverseg.model.network import Stochastic, forward_flops, require_divisible
from liverseg.training.augment import AugmentParams, Context, apply, draw
from liverseg.training.callbacks import SILENT, Callbacks
from liverseg.training.checkpoint import BEST, LAST, changes, check_same_spec, load_checkpoint, restore
from liverseg.training.config import TrainConfig, config_from_json, save_config
from liverseg.training.memory import room_bytes, shortage, step_memory
from liverseg.training.process_group import ProcessGroup, process_group, synchronise_norms, wrap
from liverseg.training.provenance import record_start, require_own_run
from liverseg.training.run_files import (
    EXAMPLES,
    HISTORY,
    PROGRESS,
    TENSORBOARD,
    RunWriter,
    example_of,
    tensorboard_writer,
    write_history,
    write_tensorboard,
)
from liverseg.training.split import (
    SPLIT,
    Split,
    check_trained_on,
    load_split,
    make_split,
    same_images,
    save_split,
)
from liverseg.training.state import (
    Row,
    TrainState,
    class_shares,
    is_validated,
    learning_rate,
    new_state,
    out_of_patience,
    selection_score,
    update_average,
    warmup_steps,
)
from liverseg.training.stream import Batch, Prefetch, SampleSpec, Volumes, epoch_draws
from liverseg.training.training_data import TrainingData, describe_training_data
from liverseg.training.validate import NOT_VALIDATED, Validation

CONFIG = "config.toml"
# The gradient takes two products where the forward pass takes one: that of the input and that of the weights.
PASSES = 3

Network = Callable[[Tensor], "Tensor | tuple[Tensor, ...]"]


def train(
    store: CacheStore, run: Path, config: TrainConfig, *, resume: bool, watcher: Callbacks
) -> TrainState:
    """Train a network on the cases of ``store`` and keep everything in ``run``.

    Started by ``torchrun``, each process has a device and a share of every batch: ``optim.batch_size`` is per
    device, so that a step sees as many samples as there are devices times that. Process 0 writes.

    Args:
        store: The cache.
        run: Folder of the run: config.toml, split.json, run.json, last.pt, best.pt, history.csv, progress.png,
            examples/ and, where it is installed, tensorboard/.
        config: What to do; ``optim.epochs`` counts from the beginning also when resuming.
        resume: Continue from ``last.pt``, or start if there is none yet; the number of devices may have changed.
        watcher: Told about progress.

    Raises:
        RunError: ``run`` holds a run already, or its checkpoint does not fit.
        OutputError: ``run`` has a file that would be replaced and is not of a run.
        DivergedError: The loss is not finite.
        ConfigError: The device or a named case does not exist, the norm cannot be shared by the devices, or the network
            is too deep for the cached views.
    """
    with process_group(config.device) as group, freed_memory_reused(group.device):
        return _train(
            store, run, config, group, resume=resume, watcher=watcher if group.is_main_process else SILENT
        )


def _train(
    store: CacheStore,
    run: Path,
    config: TrainConfig,
    group: ProcessGroup,
    *,
    resume: bool,
    watcher: Callbacks,
) -> TrainState:
    # The main process decides: the others may be on machines that do not see its folder.
    split, content = group.from_main(lambda: _beginning(store, run, config, resume=resume))
    state = new_state(config, group.device, class_shares=class_shares([store.meta(i) for i in split.train]))
    if content is not None:
        restore(state, content, config, path=run / LAST)
        for line in _resumed(run, state, config, "; ".join(changes(content, config, path=run / LAST))):
            watcher.started(line)
    elif resume:
        watcher.started(f"{run}: no checkpoint yet, starting from the beginning")
    trainer = Trainer(store, split, config, group, state)
    # Only now: a resume that is refused must leave the run as it was.
    if group.is_main_process:
        training = describe_training_data(store, split.train)
        # A finished run keeps the settings that it was trained with.
        kept = _trained_with(content, config, path=run / LAST) if _is_done(state, config) else config
        _prepare_folder(run, store, kept, split, state, group, training)
    if warmup_steps(config.optim) < config.optim.warmup_steps:
        watcher.started(
            f"optim.warmup_steps: {config.optim.warmup_steps} is more than half of the run: "
            f"warming up for {pluralise(warmup_steps(config.optim), 'step')}"
        )
    watcher.started(trainer.description())
    for doubt in (*_shared_images(store, split), *trainer.warnings()):
        watcher.started(f"warning: {doubt}")
    if group.is_main_process:
        _run_and_keep(trainer, run, store, training, watcher)
    else:
        while not _is_done(state, config):
            trainer.run_epoch(watcher)
    return state


def _shared_images(store: CacheStore, split: Split) -> Iterator[str]:
    for validates, trains in same_images(store, split):
        yield (
            f"{validates} validates and is the same scan as {trains}, which is trained on: its score means nothing; remove "
            "one of them from the data set"
        )


def _resumed(run: Path, state: TrainState, config: TrainConfig, differences: str) -> Iterator[str]:
    """What to say of a run that is resumed, perhaps with settings or software other than it had."""
    if not _is_done(state, config):
        if differences:
            yield f"{run}: resumed with other settings or software than before: {differences}"
        return
    early = state.epoch < config.optim.epochs
    remedy = "optim.patience, or set it to null," if early else f"optim.epochs above {state.epoch}"
    unused = f"; these changes have no effect: {differences}" if differences else ""
    yield (
        f"{run}: is finished after {pluralise(state.epoch, 'epoch')}: nothing is trained{unused}: raise {remedy} to continue"
    )


def _trained_with(content: dict[str, Any] | None, config: TrainConfig, *, path: Path) -> TrainConfig:
    return config if content is None else config_from_json(content["config"], source=str(path))


def _is_done(state: TrainState, config: TrainConfig) -> bool:
    return state.epoch >= config.optim.epochs or out_of_patience(state.history, config.optim.patience)


def _run_and_keep(
    trainer: Trainer, run: Path, store: CacheStore, training: TrainingData, watcher: Callbacks
) -> None:
    state, config = trainer.state, trainer.config
    board = tensorboard_writer(run, epoch=state.epoch)
    with RunWriter(run, config, store.schema.spec, training) as files:
        while not _is_done(state, config):
            is_best = trainer.run_epoch(watcher)
            files.keep(state, is_best=is_best, is_last=_is_done(state, config))
            if _is_due(state.epoch, config.watch.pictures_every):
                files.draw_example(example_of(run, state, trainer.validation, store))
            if board is not None:
                write_tensorboard(board, state.history[-1])
            watcher.finished_epoch(state.history[-1])


def _beginning(
    store: CacheStore, run: Path, config: TrainConfig, *, resume: bool
) -> tuple[Split, dict[str, Any] | None]:
    """The cases of a run, and the checkpoint that it continues from, if any."""
    require_divisible(config.model, store.schema.spec.shape_zyx)
    split = _choose_split(store, run, config, resume=resume)
    if not (resume and (run / LAST).exists()):
        return split, None
    content = load_checkpoint(run / LAST)
    check_same_spec(content, store.schema.spec, path=run / LAST)
    return split, content


def _prepare_folder(
    run: Path,
    store: CacheStore,
    config: TrainConfig,
    split: Split,
    state: TrainState,
    group: ProcessGroup,
    training: TrainingData,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    record_start(run, store, group, training)  # first: it says that what is beside it is a run's
    save_config(config, run / CONFIG)
    save_split(split, run)
    if state.history:  # killed after the checkpoint, a run may lack what follows from it
        write_history(run, state.history)


def _choose_split(store: CacheStore, run: Path, config: TrainConfig, *, resume: bool) -> Split:
    if not resume and ((run / LAST).exists() or (run / HISTORY).exists()):
        raise RunError(
            f"{run}: holds a run already: resume it (--resume, or resume=True), or name another folder"
        )
    if not (run / LAST).exists() and (run / HISTORY).exists():
        raise RunError(f"{run}: has a {HISTORY} but no {LAST} to resume from: name another folder")
    if not (run / LAST).exists():
        require_own_run(run, (CONFIG, SPLIT, BEST, HISTORY, PROGRESS, EXAMPLES, TENSORBOARD))
    if config.watch.raw is not None and not Path(config.watch.raw).is_dir():
        raise ConfigError(
            f"{config.watch.raw}: no such folder: watch.raw (--raw) names the data set that the cache is of"
        )
    if not (resume and (run / SPLIT).exists()):
        split = make_split(store, config.data, seed=config.seed)
    else:
        split = load_split(run)
        check_trained_on(split, store)
    if config.watch.raw is not None:
        _check_raw(Path(config.watch.raw), store, split)
    return split


def _check_raw(raw: Path, store: CacheStore, split: Split) -> None:
    """Refuse a data set that would end the run at its first scores on native grids, hours from now."""
    labels = [label for case_id in split.val if (label := store.meta(case_id).label) is not None]
    for label in labels:
        path = raw / label.path
        found = path.stat().st_size if path.is_file() else None
        if found != label.size_bytes:
            what = "no such file" if found is None else f"expected {label.size_bytes} bytes, found {found}"
            raise ConfigError(
                f"{path}: {what}: watch.raw (--raw) names the data set that {store.path} was built from"
            )


def _is_due(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0


class Trainer:
    """Wires the parts of a run together; what changes is in ``state``."""

    def __init__(
        self, store: CacheStore, split: Split, config: TrainConfig, group: ProcessGroup, state: TrainState
    ) -> None:
        self.config = config
        self.group = group
        self.state = state
        self.split = split
        self.metas = [store.meta(case_id) for case_id in split.train]
        self.volumes = Volumes(store, split.train, resident=config.data.resident, device=group.device)
        self.validation = Validation(store, split.val, config, group)
        self.shape_zyx = shape_zyx = store.schema.spec.shape_zyx
        self.dtype = training_dtype(
            config.precision, group.device, slices=shape_zyx[0], poolings=config.model.depth
        )
        self.sample_flops = PASSES * forward_flops(config.model, shape_zyx)
        self.peak_flops = matmul_peak(group.device, self.dtype or torch.float32)
        compiled = compiles(config.compile, group.device, devices=group.size) and not config.recompute
        synchronise_norms(state.network, group, compiled=compiled)
        self.module = wrap(state.network, group)
        self.network = cast("Network", torch.compile(self.module) if compiled else self.module)
        # With several devices a batch is that of all of them together.
        across = group.size > 1 and config.loss.sums == "batch"
        self.loss = replace(config.loss, sums="devices") if across else config.loss

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all devices in an epoch."""
        return self.config.optim.steps_per_epoch * self.config.optim.accumulate * self.samples_at_once

    @property
    def samples_at_once(self) -> int:
        """Samples of all devices in a batch."""
        return self.config.optim.batch_size * self.group.size

    def description(self) -> str:
        """One line on what is about to run."""
        parameters = sum(p.numel() for p in self.state.network.parameters())
        devices = f"{self.group.size} devices like " if self.group.size > 1 else ""
        step = step_memory(self.config, self.shape_zyx, self.dtype, devices=self.group.size).total
        room = room_bytes(self.group.device)
        free = "" if room is None else f", {room / 2**30:.1f} GiB are free"
        return (
            f"{len(self.split.train)} training and {len(self.split.val)} validation cases, "
            f"{self.volumes.size_bytes / 2**20:.0f} MiB kept in the {self.volumes.place}; "
            f"{parameters:,} parameters on {devices}{self.group.device} in {DTYPE_NAMES[self.dtype or torch.float32]}, "
            f"matmul peak {self.peak_flops / 1e12:.2f} TFLOP/s; tensors of a step {step / 2**30:.2f} GiB{free}"
        )

    def warnings(self) -> Iterator[str]:
        """What may go wrong on this device: its memory is too small for a step, or its cuDNN has a fault."""
        device, room = self.group.device, room_bytes(self.group.device)
        if room is not None:
            held = self.volumes.size_bytes if self.volumes.place == "device" else 0
            half = autocast_dtype("auto", device)
            words = shortage(
                self.config,
                self.shape_zyx,
                self.dtype,
                devices=self.group.size,
                room=room - held,
                half=half,
            )
            yield from () if words is None else (words,)
        doubt = cudnn_warning(device, self.dtype)
        yield from () if doubt is None else (doubt,)

    def run_epoch(self, watcher: Callbacks) -> bool:
        """One epoch and its validation; appends the row to the history; returns whether it is the best so far."""
        state, start = self.state, time.perf_counter()
        train_loss, waited_s = self.train_epoch(watcher)
        self._check_weights()
        seconds = time.perf_counter() - start
        row: Row = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "train_loss": train_loss,
            **self._scores(state.epoch + 1),
            "learning_rate": learning_rate(max(0, state.step - 1), self.config.optim),
            **self._speed(seconds, waited_s),
            "seconds": time.perf_counter() - start,
        }
        state.epoch += 1
        state.history.append(row)
        if not is_validated(row) or selection_score(row) <= state.best_score:
            return False
        state.best_score = selection_score(row)
        return True

    def _scores(self, epoch: int) -> Row:
        watch, last = self.config.watch, epoch == self.config.optim.epochs
        native = _is_due(epoch, watch.native_every) or last
        # What is scored on native grids is scored anyway.
        if not (_is_due(epoch, watch.validate_every) or last or (native and watch.raw is not None)):
            return NOT_VALIDATED
        return self.validation.score(self.state.average, native=native)

    def _speed(self, seconds: float, waited_s: float) -> Row:
        rate = self.samples_per_epoch / seconds
        return {
            "samples_per_second": rate,
            "mfu": rate * self.sample_flops / (self.peak_flops * self.group.size),
            "wait_share": waited_s / seconds,
        }

    def train_epoch(self, watcher: Callbacks) -> tuple[float, float]:
        """Mean loss, and the seconds that were waited for data."""
        optim, state, start = self.config.optim, self.state, time.perf_counter()
        # All chance of an epoch follows from seed and epoch: resuming needs no generator's state.
        rng = np.random.default_rng([self.config.seed, state.epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        # Dropout draws from the global generator, and on each device something else.
        torch.manual_seed(int(rng.integers(2**62)) + self.group.rank)
        draws = epoch_draws(self.metas, self.config.data, count=self.samples_per_epoch, rng=rng)
        plan = list(_chunks(draws, optim.accumulate * self.samples_at_once))
        own = Prefetch([d[part] for d in plan for part in self._parts()], self.volumes.fetch)
        batches = iter(own)
        state.network.train()
        losses = torch.zeros(optim.steps_per_epoch, device=self.group.device)
        for step, step_draws in enumerate(plan, 1):
            losses[step - 1] = self._step(batches, step_draws, generator)
            if step % self.config.watch.log_every == 0 or step == len(plan):
                self._check(losses[:step], plan)
            rate = step * len(step_draws) / (time.perf_counter() - start)
            watcher.stepped(state.epoch + 1, step, rate)
        return self.group.sum(losses).mean().item() / self.group.size, own.waited_s

    def _parts(self) -> list[slice]:
        """Which of a step's samples this device sees in each of its batches."""
        starts = range(0, self.config.optim.accumulate * self.samples_at_once, self.samples_at_once)
        return [slice(i + self.group.rank, i + self.samples_at_once, self.group.size) for i in starts]

    def _check(self, losses: Tensor, plan: Sequence[Sequence[SampleSpec]]) -> None:
        """The only place between two steps where the host waits for the device.

        Weights may be spoilt by now, but nothing has been written since the epoch began.
        """
        values = self.group.sum(losses).tolist()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is None:
            return
        case_ids = dict.fromkeys(d.case_id for d in plan[bad])
        raise DivergedError(
            f"the loss is {values[bad]} in epoch {self.state.epoch + 1}, step {bad + 1}, on cases "
            f"{', '.join(case_ids)}: look at them, or lower optim.learning_rate"
        )

    def _check_weights(self) -> None:
        """A loss can be finite and its gradient not: after the last step of an epoch no loss would show it."""
        weights = [p.detach() for p in self.state.network.parameters()]
        if not bool(torch.nn.utils.get_total_norm(weights).isfinite()):
            raise DivergedError(
                f"the weights are not finite after epoch {self.state.epoch + 1}: lower optim.learning_rate, or "
                "set precision=fp32"
            )

    def _step(
        self, batches: Iterator[Batch], draws: Sequence[SampleSpec], generator: torch.Generator
    ) -> Tensor:
        """One step on the mean gradient of its batches; the mean loss, still on the device."""
        state, optim = self.state, self.config.optim
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, optim)
        state.optimizer.zero_grad(set_to_none=True)
        # Drawn for the whole step: the same samples come out, however they are dealt to batches and devices.
        parts_b32 = torch.tensor([d.part_zyx for d in draws])
        _, height, width = self.shape_zyx
        params = draw(
            len(draws),
            self.config.augment,
            parts_b32=parts_b32,
            pixel_aspect_b=torch.tensor([d.height_over_width * width / height for d in draws]),
            generator=generator,
        )
        parts, values = self._parts(), []
        for i, part in enumerate(parts):
            with self._meeting(last=i == len(parts) - 1):
                values.append(self._gradient(next(batches), params.part(part)))
        if self._update():
            state.step += 1
            update_average(state.average, state.network, decay=optim.ema_decay, step=state.step)
        return torch.stack(values).mean()

    def _update(self) -> bool:
        """Clip the gradients and step; False where a float16 gradient overflowed, and the step was skipped.

        Elsewhere the scaler passes everything through, and the host does not wait for the device.
        """
        scaler, optimizer = self.state.scaler, self.state.optimizer
        scaler.unscale_(optimizer)
        for weights in self.state.network.parts():
            torch.nn.utils.clip_grad_norm_(weights, self.config.optim.clip_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() >= scale  # it is halved after an overflow

    def _meeting(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Devices add up their gradients in the last of a step's backward passes only."""
        if last or self.group.size == 1:
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[None]", self.module.no_sync())  # type: ignore[operator]

    def _context(self, batch: Batch) -> Context | None:
        if batch.context_image_bczyx is batch.image_bczyx:
            return None
        return Context(
            image_bczyx=network_input(batch.context_image_bczyx, self.config.input),
            fractions_bczyx=foreground_fractions(batch.context_fractions_bczyx),
            inner_b32=batch.inner_b32,
        )

    def _gradient(self, batch: Batch, params: AugmentParams) -> Tensor:
        """Add the gradient of a batch's loss, over ``accumulate``, to the weights'; returns the loss."""
        # The background is what interpolated foreground leaves: a channel less to sample.
        image, foreground = apply(
            network_input(batch.image_bczyx, self.config.input),
            foreground_fractions(batch.fractions_bczyx),
            params,
            context=self._context(batch),
        )
        fractions = add_background(foreground)
        with autocast(self.group.device, self.dtype):
            outputs = self.network(image.contiguous(memory_format=torch.channels_last_3d))
        value = outputs_loss(outputs, fractions, self.loss, stochastic=self.config.model.stochastic)
        self.state.scaler.scale(value / self.config.optim.accumulate).backward()  # type: ignore[no-untyped-call]
        return value.detach()


def outputs_loss(
    outputs: Tensor | tuple[Tensor, ...],
    fractions_bczyx: Tensor,
    config: LossConfig,
    *,
    stochastic: Stochastic,
) -> Tensor:
    """The loss of what ``UNet.forward`` gives in training; with ``ssn`` of the mean, and the likelihood of the samples."""
    if stochastic != "ssn":
        return levels_loss(outputs, fractions_bczyx, config)
    *levels, samples_nbczyx = outputs
    likelihood = negative_log_likelihood(samples_nbczyx, fractions_bczyx)
    return levels_loss(tuple(levels), fractions_bczyx, config) + likelihood


def levels_loss(logits: Tensor | tuple[Tensor, ...], fractions_bczyx: Tensor, config: LossConfig) -> Tensor:
    """The loss; with deep supervision the mean over levels, each weighing half of the next finer one.

    Fractions are averaged down to a coarser level's voxels exactly, which ids could not be.
    """
    if isinstance(logits, Tensor):
        return loss_of(logits, fractions_bczyx, config)
    weights = [0.5**level for level in range(len(logits))]
    losses = [
        loss_of(level_logits, F.avg_pool3d(fractions_bczyx, 2**level), config)
        for level, level_logits in enumerate(logits)
    ]
    return torch.stack([w * v for w, v in zip(weights, losses, strict=True)]).sum() / sum(weights)


def _chunks(draws: Sequence[SampleSpec], size: int) -> Iterator[Sequence[SampleSpec]]:
    return (draws[i : i + size] for i in range(0, len(draws), size))
